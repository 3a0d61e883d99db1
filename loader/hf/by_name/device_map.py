"""Translates a device_map of transformers to the `device` of loader.from_pretrained."""

from typing import Any

import torch

from formats.config.field_rules import short
from formats.errors import RecipeError

_KNOWN = "known values: auto, cpu, cuda, cuda:N, N and {'': one of these}"
_SPLIT_HINT = (
    "leave it out: the loader keeps experts on disk, in RAM and on GPUs (ram_cache, gpu_cache);"
    " device='cuda:0,cuda:1' splits them over GPUs"
)


def device_of_map(device_map: Any) -> str:
    """Return "auto", "cpu", "cuda" or "cuda:N".

    Raises RecipeError for a map that splits the model, and for other devices.
    """
    if not isinstance(device_map, dict):
        return _device(device_map)
    devices = sorted({_device(device) for device in device_map.values()})
    if len(devices) > 1:
        raise RecipeError(
            f"device_map: the layers are split over {', '.join(devices)}", _SPLIT_HINT
        )
    if not devices:
        raise RecipeError("device_map: the map is empty", _KNOWN)
    return devices[0]


def _device(device: Any) -> str:
    if device == "auto":
        return "auto"
    if device in ("balanced", "balanced_low_0", "sequential", "disk"):
        raise RecipeError(f"device_map: {device!r} splits the model", _SPLIT_HINT)
    if isinstance(device, int) and not isinstance(device, bool) and device >= 0:
        return f"cuda:{device}"
    if isinstance(device, str | torch.device):
        try:
            known = torch.device(device)
        except RuntimeError:
            raise RecipeError(f"device_map: {short(device)} is not a device", _KNOWN) from None
        if known.type in ("cpu", "cuda"):
            return "cpu" if known.type == "cpu" else str(known)
    raise RecipeError(f"device_map: {short(str(device))} cannot run a converted model", _KNOWN)
