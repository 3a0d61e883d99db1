"""Turns the option `device` into the GPUs that a model runs on."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from formats.errors import MoeConvertError, RecipeError
from formats.hub.hub_settings import KERNELS_FOLDER, kept_root
from loader.cuda.device import nvrtc
from loader.cuda.device.device import Device
from loader.cuda.products.self_check import check_products

_log = logging.getLogger(__name__)

One = str | int | torch.device | Device
Devices = One | Sequence[One] | None


def choose_devices(requested: Devices, packings: Iterable[str]) -> list[Device]:
    """Return the GPUs for `device=requested`; the first one gets the trunk. Empty means the CPU.

    requested: "cpu"; "cuda" (torch's current GPU) or "cuda:1"; several as "cuda:0,cuda:1" or as a
    list; an int N for "cuda:N"; a torch.device; a `Device`. "auto" or None takes the current GPU if
    it computes small products in `packings` like the reference. Otherwise it takes the CPU; if
    there is a GPU, a warning says why. Raises RecipeError for any other value, and MoeConvertError
    if a named GPU is missing or computes wrongly.
    """
    names = device_names(requested)
    if names == ["cpu"]:
        return []
    if names == ["auto"]:
        return _automatic(packings)
    unopened = [name for name in names if isinstance(name, str)]
    from loader.cuda.device.torch_device import cuda_devices

    opened = iter(cuda_devices(unopened, kept_root() / KERNELS_FOLDER) if unopened else [])
    devices: list[Device] = [next(opened) if isinstance(name, str) else name for name in names]
    if not devices or len({device.name for device in devices}) < len(devices):
        raise RecipeError(
            f"device: {requested!r} does not name each GPU once", "give GPUs as cuda:0,cuda:1"
        )
    for device in devices:
        check_products(device, packings)
    return devices


def device_names(requested: Devices) -> list[str | Device]:
    """Return the names in `requested`, a `Device` as it is. Raises RecipeError for other values."""
    names = _names(requested)
    if names in (["auto"], ["cpu"]):
        return names
    for name in [name for name in names if isinstance(name, str)]:
        kind, _, number = name.partition(":")
        if kind != "cuda" or not (number.isdecimal() or name == "cuda"):
            raise RecipeError(
                f"device: {name!r} is unknown; known are auto, cpu, cuda, cuda:N,"
                " and several GPUs as cuda:0,cuda:1"
            )
    return names


def _names(requested: Devices) -> list[str | Device]:
    if requested is None:
        return ["auto"]
    if isinstance(requested, str):
        return [name.strip() for name in requested.split(",")]
    several = requested if isinstance(requested, list | tuple) else [requested]
    return [_name(one) for one in several]


def _name(one: Any) -> str | Device:
    """Return a device's name; a `Device` as it is."""
    if isinstance(one, torch.device):
        return "cpu" if one.type == "cpu" else str(one)
    if isinstance(one, int) and not isinstance(one, bool):
        return f"cuda:{one}"
    if isinstance(one, str) or hasattr(one, "torch_device"):
        known: str | Device = one
        return known
    raise RecipeError(f"device: {one!r} is no device", "give cpu, cuda, cuda:1 or auto")


def describe_gpus() -> str:
    """Return the GPUs that torch finds, or the reason for none, in one line."""
    if not torch.cuda.is_available():
        cause = "is built without CUDA" if torch.version.cuda is None else "finds none"
        return f"none: torch {torch.__version__} {cause}"
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = [
        f"cuda:{i} {p.name}, {p.total_memory >> 20} MiB, sm_{p.major}{p.minor}"
        for i, p in enumerate(gpus)
    ]
    return "; ".join(names) + ("" if nvrtc.is_available() else "; not used: NVRTC is missing")


def _automatic(packings: Iterable[str]) -> list[Device]:
    if not torch.cuda.is_available():
        return []
    try:
        return choose_devices("cuda", packings)
    except MoeConvertError as e:
        _log.warning("the GPU is not used: %s", e)
        return []
