"""Experts where they lie in a map: no copy, the page cache is the cache."""

import contextlib
import mmap
import os

import torch
from torch import Tensor

from formats.artifact import Artifact
from formats.errors import DamageError
from formats.files.io_errors import translated
from formats.files.paths import open_regular
from formats.reading.reader import ExpertReader, Load

_POPULATE_READ = 22
"""Linux's MADV_POPULATE_READ (5.14), for which the mmap module has no name: reads pages in and maps
them at once.
"""


class MmapReader(ExpertReader):
    """Experts as views of maps.

    A file that is cut while it is mapped kills the process with SIGBUS; `DirectReader` raises
    instead. An expert's checksum is compared when the expert is first used, and again after its
    memory was given back.
    """

    def __init__(self, artifact: Artifact, *, check: str = "fast") -> None:
        super().__init__(artifact, check=check)
        self._compared: set[tuple[int, int]] = set()
        self._maps: list[tuple[mmap.mmap, Tensor]] = []
        self._descriptors: list[int] = []
        try:
            for layer, file in enumerate(artifact.index.layers):
                self._descriptors.append(open_regular(artifact.layer_path(layer)))
                path = artifact.folder / file.file
                if os.fstat(self._descriptors[-1]).st_size != file.size_bytes:
                    raise DamageError(f"{path}: its size changed since the folder was opened")
                # A private writable map: torch has no read-only tensors, and a stray write must not
                # reach the file.
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

    def load(self, layer: int, expert: int, buffer: Tensor | None) -> Load:
        entry = self.artifact.entry(layer, expert)
        place = self._maps[layer][1][entry.offset : entry.offset + entry.length]
        return Load(self, layer, expert, place, None if self.in_place(layer, expert) else buffer)

    def fetch(self, layer: int, expert: int, place: Tensor, begin: int, end: int) -> None:
        offset = self.artifact.entry(layer, expert).offset
        # Where the system doesn't know it, the pages come as they are touched.
        with contextlib.suppress(OSError, ValueError):
            self._maps[layer][0].madvise(_POPULATE_READ, offset + begin, end - begin)

    def check(self, layer: int, expert: int, stored: Tensor) -> None:
        # What is decoded from a map is read from it anew each time.
        if (layer, expert) not in self._compared or not self.in_place(layer, expert):
            super().check(layer, expert, stored)
            self._compared.add((layer, expert))

    def forget(self, layer: int, expert: int) -> None:
        self._compared.discard((layer, expert))
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
