"""How fast a GPU is fed and reads its memory, measured within half a second each."""

from collections.abc import Callable
from functools import partial

from formats import ALIGNMENT_BYTES
from formats.reading.reader import aligned_bytes
from loader.arithmetic.machine import calls_per_s
from loader.cuda.device.device import Device

_BATCH = 8
"""Copies between two waits of the host, so that these cost nothing."""

_MEMORY_BYTES = 256 << 20
"""More than caches of GPUs hold."""


def link_bytes_per_s(device: Device, block_bytes: int, seconds: float = 0.5) -> float:
    """Copies a block of that size, such as an expert, from page-locked memory to `device` for that
    long. Where the system page-locks nothing, it is the speed without. torch.OutOfMemoryError if
    the block does not fit the GPU.
    """
    block_bytes = -(-block_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    source, target = aligned_bytes(block_bytes).fill_(1), device.empty(block_bytes)
    # The stream that the memory belongs to: it may be freed without more.
    stream = device.compute_stream()
    pinned = device.pin(source)
    try:
        return block_bytes * _calls_per_s(
            lambda: device.copy(target, source, stream), stream.synchronize, seconds
        )
    finally:
        stream.synchronize()
        if pinned:
            device.unpin(source)


def memory_bytes_per_s(device: Device, seconds: float = 0.5) -> float:
    """Copies 256 MiB, or a quarter of the free memory if that is less, within `device`: bytes read
    and written.
    """
    n_bytes = min(_MEMORY_BYTES, device.memory()[0] // 4)
    source, target = device.empty(n_bytes), device.empty(n_bytes)
    return (
        2
        * n_bytes
        * _calls_per_s(partial(target.copy_, source), device.compute_stream().synchronize, seconds)
    )


def _calls_per_s(call: Callable[[], object], wait: Callable[[], None], seconds: float) -> float:
    """Of `call`, which queues something that `wait` waits for."""

    def batch() -> None:
        for _ in range(_BATCH):
            call()
        wait()

    call()
    wait()
    return _BATCH * calls_per_s(batch, seconds)
