"""Expert slots are given up before a forward pass fails for lack of GPU memory."""

import functools
import logging
import os
from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn

from formats.errors import DoesNotFitError
from loader.cache import ExpertCache
from loader.cuda.device import Device
from loader.forks import no_gpu_after_fork

_log = logging.getLogger(__name__)

LEAST_BYTES = 256 << 20
"""What is given up at a time, at first; twice as much each time that this was not enough."""


def give_up_slots_for_memory(model: nn.Module, cache: ExpertCache, layer_devices: Sequence[Device]) -> None:
    """Puts a second try around the model's forward: after an out-of-memory error slots of the device are freed; the
    KV cache has its former length then (loader/torch_threads.py). DoesNotFitError if no slot is left to give."""
    before, process = model.forward, os.getpid()
    # The first layer of each device stands for it.
    layers = {device.name: layer for layer, device in reversed(list(enumerate(layer_devices)))}

    @functools.wraps(before)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if os.getpid() != process:
            raise no_gpu_after_fork()
        wanted = LEAST_BYTES
        while True:
            try:
                return before(*args, **kwargs)
            except torch.OutOfMemoryError as e:
                reason = str(e).splitlines()[0]
            # Here, outside of the except: the error's frames hold experts that were in use.
            freed = sum(cache.shrink(wanted, layer) for layer in layers.values())
            if not freed:
                raise DoesNotFitError(
                    f"GPU memory is used up, and no expert slot is left to give: {reason}",
                    "shorten the prompt or context, or free GPU memory",
                ) from None
            for device in {device.name: device for device in layer_devices}.values():
                device.release()
            _log.warning("GPU memory was used up: %d MiB of expert slots given up, and tried again", freed >> 20)
            wanted *= 2

    model.forward = MethodType(forward, model)
