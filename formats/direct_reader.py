"""Experts read into buffers past the page cache: the disk's full speed at a fifth of the processor time of a map."""

import errno
import os

from torch import Tensor

from formats import ALIGNMENT_BYTES
from formats.artifact import Artifact
from formats.errors import DamageError
from formats.paths import open_regular
from formats.reader import ExpertReader, Load, aligned_bytes


class DirectReader(ExpertReader):
    """Experts in memory of the caller's.

    O_DIRECT where the file system takes it; elsewhere ordinary reads, after which the page cache is asked to forget.
    """

    def __init__(self, artifact: Artifact, *, check: bool = False) -> None:
        super().__init__(artifact, check=check)
        self._descriptors: list[int] = []
        self._direct: list[bool] = []
        try:
            for layer in range(len(artifact.index.layers)):
                path = artifact.layer_path(layer)
                self._descriptors.append(open_regular(path))
                self._direct.append(_make_direct(self._descriptors[-1]))
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
        descriptor = self._descriptors[layer]
        view = place.numpy().data
        done = begin
        while done < end:
            # Whole pages: what lies behind an expert is read with it, up to the next page.
            stop = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES if self._direct[layer] else end
            try:
                count = os.preadv(descriptor, [view[done:stop]], entry.offset + done)
            except OSError as e:
                # Not for this file system, or the read before stopped within a page.
                if e.errno != errno.EINVAL or not self._direct[layer]:
                    raise
                _make_buffered(descriptor)
                self._direct[layer] = False
                continue
            if count == 0:
                name = self.name(layer, expert)
                raise DamageError(f"{name}: the file ends after {done} of {entry.length} bytes")
            done += count
        if not self._direct[layer] and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, entry.offset + begin, end - begin, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()


def _make_direct(descriptor: int) -> bool:
    """Whether reads of `descriptor` now go past the page cache and so must be aligned."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return False
    import fcntl

    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | flag)
    except OSError:
        return False
    return True


def _make_buffered(descriptor: int) -> None:
    import fcntl

    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)
