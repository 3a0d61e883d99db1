"""Measures how fast this machine reads its memory and a disk, in a second each."""

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
"""Larger than the caches of processors."""


def memory_bytes_per_s(seconds: float = 0.5) -> float:
    """Return the speed of memory reads, in bytes per second, measured for `seconds`.

    Sums 256 MiB repeatedly, with the native kernels' threads if the library is available.
    """
    buffer = aligned_bytes(_MEMORY_BYTES).fill_(1)
    words = buffer.view(torch.int64)
    call = partial(kernels.stream_sum, [buffer]) if kernels.available() else words.sum
    return _MEMORY_BYTES * calls_per_s(call, seconds)


def calls_per_s(call: Callable[[], object], seconds: float) -> float:
    """Return how many times per second `call` runs, measured for `seconds`."""
    calls, begin_s, now_s = 0, time.perf_counter(), 0.0
    while now_s - begin_s < seconds:
        call()
        calls += 1
        now_s = time.perf_counter()
    return calls / (now_s - begin_s)


def disk_bytes_per_s(files: Sequence[Path], block_bytes: int, seconds: float = 1.0) -> float:
    """Return the speed of O_DIRECT reads, in bytes per second, measured for `seconds`.

    Blocks of `block_bytes` are read one after the other, from random places of `files`.
    Raises MoeConvertError if no file has so many bytes.
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
            "give the speed with --disk",
        )
    # The disk may have read neighbours ahead.
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
