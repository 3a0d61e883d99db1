"""Measures the speed of a GPU's link and of its memory, half a second each."""

from collections.abc import Callable
from functools import partial

from formats import ALIGNMENT_BYTES
from formats.reading.reader import aligned_bytes
from loader.arithmetic.machine import calls_per_s
from loader.cuda.device.device import Device

_BATCH = 8
"""Copies between two waits of the host, which makes the cost of waiting negligible."""

_MEMORY_BYTES = 256 << 20
"""Size of a copy within the GPU: larger than the caches of GPUs."""


def link_bytes_per_s(device: Device, block_bytes: int, seconds: float = 0.5) -> float:
    """Return the speed of copies from page-locked RAM to `device`, in bytes per second.

    block_bytes: size of one copy, such as an expert's. The RAM is pageable if the system refuses to
    lock it. Raises torch.OutOfMemoryError if a block does not fit into the GPU's memory.
    """
    block_bytes = -(-block_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    source = aligned_bytes(block_bytes).fill_(1)
    target = device.empty(block_bytes)
    # torch may reuse `target` without further synchronization, because this is its own stream.
    stream = device.compute_stream()
    pinned = device.pin(source)
    copy = partial(device.copy, target, source, stream)
    try:
        return block_bytes * _calls_per_s(copy, stream.synchronize, seconds)
    finally:
        stream.synchronize()
        if pinned:
            device.unpin(source)


def memory_bytes_per_s(device: Device, seconds: float = 0.5) -> float:
    """Return the speed of copies within the GPU's memory, in bytes read plus written per second.

    A copy has 256 MiB, or a quarter of the free memory if that is less.
    """
    n_bytes = min(_MEMORY_BYTES, device.memory()[0] // 4)
    source = device.empty(n_bytes)
    target = device.empty(n_bytes)
    copy = partial(target.copy_, source)
    return 2 * n_bytes * _calls_per_s(copy, device.compute_stream().synchronize, seconds)


def _calls_per_s(call: Callable[[], object], wait: Callable[[], None], seconds: float) -> float:
    """Return how often per second `call` runs; it queues work that `wait` waits for."""

    def batch() -> None:
        for _ in range(_BATCH):
            call()
        wait()

    call()
    wait()
    return _BATCH * calls_per_s(batch, seconds)
