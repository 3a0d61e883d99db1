"""Reader with O_DIRECT: full disk speed, with a fifth of the CPU time of mmap."""

from torch import Tensor

from formats.artifact import Artifact
from formats.errors import DamageError
from formats.reading.direct_file import DirectFile
from formats.reading.reader import ExpertReader, aligned_bytes
from formats.repair_hints import repair_command


class DirectReader(ExpertReader):
    """Reads experts into the caller's buffers."""

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

    def place(self, layer: int, expert: int, buffer: Tensor | None) -> Tensor:
        entry = self.artifact.entry(layer, expert)
        if buffer is None:
            raise ValueError("a direct read needs a buffer")
        return buffer if entry.codec == "none" else aligned_bytes(entry.length)

    def fetch(self, layer: int, expert: int, place: Tensor, begin: int, end: int) -> None:
        entry = self.artifact.entry(layer, expert)
        position = self._files[layer].read(entry.offset, place.numpy().data, begin, end)
        if position < end:
            raise DamageError(
                f"{self.name(layer, expert)}: the file ends after {position} of {entry.length}"
                " bytes",
                repair_command(self.artifact.folder, self.artifact.index),
            )

    def close(self) -> None:
        for file in self._files:
            file.close()
        self._files.clear()
