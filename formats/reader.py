"""An expert's packed bytes from a converted folder, over mmap or over pread."""

import mmap
import os
from abc import ABC, abstractmethod
from types import TracebackType

import torch
import zstandard
from torch import Tensor

from formats.artifact import Artifact
from formats.errors import DamageError
from formats.paths import open_regular


class ExpertReader(ABC):
    """Gives experts' packed bytes; several threads may read at once. Close it, or use it as a context."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact

    def read(self, layer: int, expert: int) -> Tensor:
        """The expert's bytes as its packings lay them out, decoded: uint8 [n_bytes]. Treat it as read-only.

        Raises DamageError naming file, layer, expert and offset if the file has become shorter or a frame is broken.
        """
        entry = self._artifact.entry(layer, expert)
        stored = self.read_stored(layer, expert)
        if entry.codec == "none":
            return stored
        n_bytes = self._artifact.layout(layer, expert).n_bytes
        frame = stored.numpy().data
        try:
            # The decompressor allocates whatever a frame says of itself: ask first.
            declared = zstandard.get_frame_parameters(frame).content_size
            if declared != n_bytes:
                place = self._place(layer, expert)
                raise DamageError(f"{place}: zstd frame of {declared} bytes, the expert takes {n_bytes}")
            decoded = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
        except zstandard.ZstdError as e:
            raise DamageError(f"{self._place(layer, expert)}: broken zstd frame: {e}") from None
        return torch.frombuffer(bytearray(decoded), dtype=torch.uint8)

    @abstractmethod
    def read_stored(self, layer: int, expert: int) -> Tensor:
        """The expert's bytes as they stand in the file: uint8 [length]. Errors as `read`."""

    @abstractmethod
    def close(self) -> None:
        """Gives up files and maps; tensors over a map keep it alive."""

    def __enter__(self) -> "ExpertReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _place(self, layer: int, expert: int) -> str:
        entry = self._artifact.entry(layer, expert)
        file = self._artifact.folder / self._artifact.index.layers[layer].file
        return f"{file}: layer {layer} expert {expert} at offset {entry.offset}"


class MmapReader(ExpertReader):
    """Experts as views of maps: no copy, the page cache is the cache.

    A file that is cut while it is mapped kills the process with SIGBUS; `PreadReader` raises instead.
    """

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact)
        self._maps: list[Tensor] = []
        for layer, file in enumerate(artifact.index.layers):
            descriptor = open_regular(artifact.layer_path(layer))
            try:
                if os.fstat(descriptor).st_size != file.size_bytes:
                    raise DamageError(f"{artifact.folder / file.file}: its size changed since the folder was opened")
                # A private writable map: torch has no read-only tensors, and a stray write must not reach the file.
                mapped = mmap.mmap(descriptor, file.size_bytes, access=mmap.ACCESS_COPY)
            finally:
                os.close(descriptor)
            self._maps.append(torch.frombuffer(mapped, dtype=torch.uint8))

    def read_stored(self, layer: int, expert: int) -> Tensor:
        entry = self._artifact.entry(layer, expert)
        return self._maps[layer][entry.offset : entry.offset + entry.length]

    def close(self) -> None:
        self._maps.clear()


class PreadReader(ExpertReader):
    """Experts read into memory of their own, one call an expert."""

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact)
        self._descriptors: list[int] = []
        try:
            for layer in range(len(artifact.index.layers)):
                self._descriptors.append(open_regular(artifact.layer_path(layer)))
        except BaseException:
            self.close()
            raise

    def read_stored(self, layer: int, expert: int) -> Tensor:
        entry = self._artifact.entry(layer, expert)
        result = torch.empty(entry.length, dtype=torch.uint8)
        view = result.numpy().data
        done = 0
        while done < entry.length:
            count = os.preadv(self._descriptors[layer], [view[done:]], entry.offset + done)
            if count == 0:
                raise DamageError(f"{self._place(layer, expert)}: the file ends after {done} of {entry.length} bytes")
            done += count
        return result

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()


READERS: dict[str, type[ExpertReader]] = {"mmap": MmapReader, "pread": PreadReader}
