"""Expert slots are given up before a forward pass fails for lack of GPU memory."""

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

LEAST_BYTES = 256 << 20
"""What is given up at a time, at first; twice as much each time that this was not enough."""


class MemoryRetry:
    """Repeats a forward pass after an out-of-memory error, with slots of the device freed.

    layer_devices: of each layer's slots. The pass must leave the KV cache as it was when it fails.
    """

    def __init__(self, cache: ExpertCache, layer_devices: Sequence[Device]) -> None:
        self._cache, self._process = cache, os.getpid()
        self._devices = {device.name: device for device in layer_devices}
        # The first layer of each device stands for it.
        self._layers = {
            device.name: layer for layer, device in reversed(list(enumerate(layer_devices)))
        }

    def run(self, forward: Callable[[], Any]) -> Any:
        """Return what `forward` gives. DoesNotFitError if no slot is left; MoeConvertError in a
        forked child.
        """
        if os.getpid() != self._process:
            raise no_gpu_after_fork()
        wanted = LEAST_BYTES
        while True:
            try:
                return forward()
            except torch.OutOfMemoryError as e:
                reason = str(e).splitlines()[0]
            # Here, outside of the except: the error's frames hold experts that were in use.
            freed = sum(self._cache.shrink(wanted, layer) for layer in self._layers.values())
            if not freed:
                raise DoesNotFitError(
                    f"GPU memory is used up, and no expert slot is left to give: {reason}",
                    "shorten the prompt or context, or free GPU memory",
                ) from None
            for device in self._devices.values():
                device.release()
            _log.warning(
                "GPU memory was used up: %d MiB of expert slots given up, and tried again",
                freed >> 20,
            )
            wanted *= 2

    def __deepcopy__(self, memo: dict[int, Any]) -> "MemoryRetry":
        """The same one: a copy of a model shares the cache."""
        return self
