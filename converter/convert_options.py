"""How to convert; none of it changes a byte of a complete result but the codec."""

from dataclasses import dataclass
from pathlib import Path

from formats.errors import RecipeError
from formats.index import CODECS


@dataclass(frozen=True)
class ConvertOptions:
    """The settings of `convert_checkpoint`, checked."""

    max_workers: int | None = 1
    """None: as many as processors, fewer where memory is short."""
    codec: str = "none"
    resume: bool = True
    force: bool = False
    calibration_file: Path | None = None
    """The text for a recipe whose option `calibrate` is "file"."""
    part: tuple[int, int] | None = None
    """(i, n): only the i-th of n equal parts of the layers, counted from 1; the folder stays
    unfinished.
    """
    max_memory_bytes: int | None = None
    """Upper limit for the process; lowers the number of workers."""

    def __post_init__(self) -> None:
        if self.max_workers is not None and self.max_workers < 1:
            raise RecipeError(f"max_workers is {self.max_workers}, at least 1 is needed")
        if self.codec not in CODECS:
            raise RecipeError(f"codec {self.codec!r} is unknown; known are {', '.join(CODECS)}")
        if self.part and not 1 <= self.part[0] <= self.part[1]:
            raise RecipeError(
                f"part {self.part[0]}/{self.part[1]} of the layers: expected 1/n to n/n"
            )
