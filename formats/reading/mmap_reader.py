"""Reader with mmap: experts are used in place, and the page cache is the cache."""

import contextlib
import mmap
import os

import torch
from torch import Tensor

from formats.artifact import Artifact
from formats.errors import DamageError
from formats.files.io_errors import translated
from formats.files.paths import open_regular
from formats.reading.reader import ExpertReader

_POPULATE_READ = 22
"""MADV_POPULATE_READ of Linux 5.14, which the mmap module lacks: reads and maps pages at once."""


class MmapReader(ExpertReader):
    """Gives experts as views of mapped files.

    If a mapped file is truncated, SIGBUS kills the process; `DirectReader` raises DamageError
    instead. An expert is checked at its first use, and again after `forget`.
    """

    def __init__(self, artifact: Artifact, *, check: str = "fast") -> None:
        super().__init__(artifact, check=check)
        self._checked: set[tuple[int, int]] = set()
        self._maps: list[tuple[mmap.mmap, Tensor]] = []
        self._descriptors: list[int] = []
        try:
            for layer, file in enumerate(artifact.index.layers):
                self._descriptors.append(open_regular(artifact.layer_path(layer)))
                path = artifact.folder / file.file
                if os.fstat(self._descriptors[-1]).st_size != file.size_bytes:
                    raise DamageError(f"{path}: its size changed since the folder was opened")
                # A private writable map: torch has no read-only tensors, and a stray write must not
                # change the file.
                with translated(path, "mapped", DamageError):
                    mapped = mmap.mmap(
                        self._descriptors[-1], file.size_bytes, access=mmap.ACCESS_COPY
                    )
                self._maps.append((mapped, torch.frombuffer(mapped, dtype=torch.uint8)))
        except BaseException:
            self.close()
            raise

    def in_place(self, layer: int, expert: int) -> bool:
        return self.artifact.entry(layer, expert).codec == "none"

    def place(self, layer: int, expert: int, buffer: Tensor | None) -> Tensor:
        entry = self.artifact.entry(layer, expert)
        return self._maps[layer][1][entry.offset : entry.offset + entry.length]

    def fetch(self, layer: int, expert: int, place: Tensor, begin: int, end: int) -> None:
        offset = self.artifact.entry(layer, expert).offset
        # Older kernels refuse it and read the pages at their first access.
        with contextlib.suppress(OSError, ValueError):
            self._maps[layer][0].madvise(_POPULATE_READ, offset + begin, end - begin)

    def check(self, layer: int, expert: int, stored: Tensor) -> None:
        # Compressed bytes are read from the map again for each use.
        if (layer, expert) not in self._checked or not self.in_place(layer, expert):
            super().check(layer, expert, stored)
            self._checked.add((layer, expert))

    def forget(self, layer: int, expert: int) -> None:
        self._checked.discard((layer, expert))
        entry = self.artifact.entry(layer, expert)
        if hasattr(mmap, "MADV_DONTNEED"):
            self._maps[layer][0].madvise(mmap.MADV_DONTNEED, entry.offset, entry.length)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(
                self._descriptors[layer], entry.offset, entry.length, os.POSIX_FADV_DONTNEED
            )

    def close(self) -> None:
        self._maps.clear()
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()
