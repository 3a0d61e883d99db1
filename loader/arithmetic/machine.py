"""How fast this machine reads its memory and a disk, measured within a second each."""

import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from formats import ALIGNMENT_BYTES
from formats.errors import MoeConvertError
from formats.reading.direct_file import DirectFile
from formats.reading.reader import aligned_bytes
from loader.arithmetic import kernels

_MEMORY_BYTES = 256 << 20
"""More than processors' caches hold."""


def memory_bytes_per_s(seconds: float = 0.5) -> float:
    """Sums 256 MiB again and again for that long, by the kernels' own threads where they are there."""
    buffer = aligned_bytes(_MEMORY_BYTES).fill_(1)
    words = buffer.view(torch.int64)
    call = partial(kernels.stream_sum, [buffer]) if kernels.available() else words.sum
    return _MEMORY_BYTES * calls_per_s(call, seconds)


def calls_per_s(call: Callable[[], object], seconds: float) -> float:
    """How often `call` ends in a second, tried for that long."""
    calls, begin_s, now_s = 0, time.perf_counter(), 0.0
    while now_s - begin_s < seconds:
        call()
        calls += 1
        now_s = time.perf_counter()
    return calls / (now_s - begin_s)


def disk_bytes_per_s(files: Sequence[Path], block_bytes: int, seconds: float = 1.0) -> float:
    """Reads blocks of that size, one after the other, from places spread over `files`, past the
    page cache.

    MoeConvertError if no file has so many bytes.
    """
    block_bytes = -(-block_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    places = [
        (file, begin)
        for file in files
        for begin in range(0, file.stat().st_size - block_bytes + 1, block_bytes)
    ]
    if not places:
        raise MoeConvertError(
            f"no file has {block_bytes} bytes to measure the disk with",
            "say how fast it is: --disk",
        )
    # Neighbours may come from a cache of the disk's.
    random.Random(0).shuffle(places)
    view = aligned_bytes(block_bytes).numpy().data
    opened = {file: DirectFile(file) for file in files}
    try:
        done_bytes, begin_s, now_s = 0, time.perf_counter(), 0.0
        for file, begin in places:
            done_bytes += opened[file].read(begin, view, 0, block_bytes)
            if (now_s := time.perf_counter()) - begin_s >= seconds:
                break
    finally:
        for direct in opened.values():
            direct.close()
    return done_bytes / (now_s - begin_s)
