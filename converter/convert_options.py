"""The settings of a conversion; only the codec changes bytes of a complete result."""

from dataclasses import dataclass
from pathlib import Path

from formats.errors import RecipeError
from formats.index import CODECS


@dataclass(frozen=True)
class ConvertOptions:
    """The validated settings of `convert_checkpoint`.

    max_workers: None for one per processor, fewer if memory is short. codec: "none" or "zstd".
    resume: continue an unfinished conversion. force: replace the files of another one.
    calibration_file: the text for a recipe whose option `calibrate` is "file". part: (i, n)
    converts only part i of n equal parts of the layers, counted from 1; the folder stays
    unfinished. max_memory_bytes: limit for the process; it lowers the number of workers.
    """

    max_workers: int | None = 1
    codec: str = "none"
    resume: bool = True
    force: bool = False
    calibration_file: Path | None = None
    part: tuple[int, int] | None = None
    max_memory_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.max_workers is not None and self.max_workers < 1:
            raise RecipeError(f"max_workers is {self.max_workers}, at least 1 is needed")
        if self.codec not in CODECS:
            raise RecipeError(f"codec {self.codec!r} is unknown; known are {', '.join(CODECS)}")
        if self.part and not 1 <= self.part[0] <= self.part[1]:
            raise RecipeError(
                f"part {self.part[0]}/{self.part[1]} of the layers: expected 1/n to n/n"
            )
