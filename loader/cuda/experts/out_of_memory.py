"""Frees expert slots and repeats a forward pass that ran out of GPU memory."""

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from formats.errors import DoesNotFitError
from loader.cuda.device.device import Device
from loader.experts.cache import ExpertCache
from loader.lifetime.forks import no_gpu_after_fork

_log = logging.getLogger(__name__)

FIRST_FREED_BYTES = 256 << 20
"""Bytes to free after the first failure. Each further failure frees twice as many."""


class MemoryRetry:
    """Repeats a forward pass after out-of-memory errors, with fewer slots each time.

    layer_devices: GPU of each layer's slots. A pass that fails must leave the KV cache unchanged.
    """

    def __init__(self, cache: ExpertCache, layer_devices: Sequence[Device]) -> None:
        self._cache = cache
        self._process = os.getpid()
        self._devices = {device.name: device for device in layer_devices}
        self._layers: dict[str, int] = {}
        """First layer of each GPU: its memory is shared by the GPU's other layers."""
        for layer, device in enumerate(layer_devices):
            self._layers.setdefault(device.name, layer)

    def run(self, forward: Callable[[], Any]) -> Any:
        """Return the result of `forward`.

        Raises DoesNotFitError if no slot is left, and MoeConvertError in a forked child.
        """
        if os.getpid() != self._process:
            raise no_gpu_after_fork()
        n_bytes = FIRST_FREED_BYTES
        while True:
            try:
                return forward()
            except torch.OutOfMemoryError as e:
                reason = str(e).splitlines()[0]
            # Outside of the except block: frames of the error hold experts that were in use.
            freed = sum(self._cache.shrink(n_bytes, layer) for layer in self._layers.values())
            if not freed:
                raise DoesNotFitError(
                    f"GPU memory is used up, and no expert slot is left to free: {reason}",
                    "shorten the prompt or context, or free GPU memory",
                ) from None
            for device in self._devices.values():
                device.release()
            _log.warning(
                "GPU memory is used up: freed %d MiB of expert slots, now trying again",
                freed >> 20,
            )
            n_bytes *= 2

    def __deepcopy__(self, memo: dict[int, Any]) -> "MemoryRetry":
        """Return the object itself: copies of a model share the cache."""
        return self
