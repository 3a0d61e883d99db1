"""Experts read into buffers past the page cache: the disk's full speed at a fifth of the processor
time of a map.
"""

from torch import Tensor

from formats.artifact import Artifact
from formats.errors import DamageError
from formats.reading.direct_file import DirectFile
from formats.reading.reader import ExpertReader, Load, aligned_bytes


class DirectReader(ExpertReader):
    """Experts in memory of the caller's."""

    def __init__(self, artifact: Artifact, *, check: str = "fast") -> None:
        super().__init__(artifact, check=check)
        self._files: list[DirectFile] = []
        try:
            for layer in range(len(artifact.index.layers)):
                self._files.append(DirectFile(artifact.layer_path(layer)))
        except BaseException:
            self.close()
            raise

    def in_place(self, layer: int, expert: int) -> bool:
        return False

    def load(self, layer: int, expert: int, buffer: Tensor | None) -> Load:
        entry = self.artifact.entry(layer, expert)
        if buffer is None:
            raise ValueError("a direct read needs a buffer")
        if entry.codec == "none":
            return Load(self, layer, expert, buffer, None)
        return Load(self, layer, expert, aligned_bytes(entry.length), buffer)

    def fetch(self, layer: int, expert: int, place: Tensor, begin: int, end: int) -> None:
        entry = self.artifact.entry(layer, expert)
        done = self._files[layer].read(entry.offset, place.numpy().data, begin, end)
        if done < end:
            raise DamageError(
                f"{self.name(layer, expert)}: the file ends after {done} of {entry.length} bytes"
            )

    def close(self) -> None:
        for file in self._files:
            file.close()
        self._files.clear()
