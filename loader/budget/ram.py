"""The RAM budget: a given size, or what `auto` finds free."""

import psutil

from formats.artifact import Artifact
from formats.files.control_group import within_group
from formats.sizes import parse_size

RESERVE_BYTES = 512 << 20
RESERVE_SHARE = 16
"""`auto` leaves free 512 MiB or 1/16 of the machine's memory, whichever is more. The reserve is for
the KV cache, activations, dequantized weights of the torch backend (under 200 MB) and other
processes.
"""


def ram_budget(
    ram_cache: int | str, artifact: Artifact, *, trunk_in_ram: bool = True, reserve_bytes: int = 0
) -> int:
    """Return how many bytes experts may use in RAM.

    ram_cache: a size for `parse_size`, or "auto": the memory that is available now, less the trunk,
    less the reserve (RESERVE_BYTES, RESERVE_SHARE), less `reserve_bytes`.
    trunk_in_ram: False if the trunk goes to a GPU; "auto" then leaves no room for it.
    Raises RecipeError for a malformed size.
    """
    if ram_cache != "auto":
        return parse_size(ram_cache, "ram_cache")
    available, total = available_memory()
    trunk = artifact.index.trunk.size_bytes if trunk_in_ram else 0
    return max(0, available - trunk - max(RESERVE_BYTES, total // RESERVE_SHARE) - reserve_bytes)


def available_memory() -> tuple[int, int]:
    """Return (available, total) bytes of the machine, or of its control group (a container) if that
    has less.
    """
    memory = psutil.virtual_memory()
    return within_group(memory.available, memory.total)
