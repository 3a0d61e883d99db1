"""The options of an export."""

from dataclasses import dataclass

from converter.gguf.block_types import Type


@dataclass(frozen=True)
class ExportOptions:
    """Types that the user chooses.

    experts: type of the experts without a smaller exact type; None allows only exact types.
    attention: type of attention and head; None for as stored, and F16 where they are packed.
    """

    experts: Type | None = None
    attention: Type | None = None
    check: str = "fast"
    """Check of the folder's bytes, one of `formats.checksums.CHECKS`."""
    license: str | None = None
    """Licence of the weights by its Hub id; None for no statement."""
