"""Which devices a model runs on: what `device=` means."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from formats.errors import MoeConvertError, RecipeError
from formats.hub.repo import kept_root
from loader.cuda.device import nvrtc
from loader.cuda.device.device import Device
from loader.cuda.products.self_check import check_products

_log = logging.getLogger(__name__)

One = str | int | torch.device | Device
Devices = One | Sequence[One] | None


def choose_devices(wish: Devices, packings: Iterable[str]) -> list[Device]:
    """The GPUs of `wish`, the trunk on the first one; none where the processor does all.

    wish: "cpu"; "cuda" (torch's present one), "cuda:1", several as "cuda:0,cuda:1" or as a list; 1
    is "cuda:1", and a torch.device is as its name. "auto" or None: the present GPU, if there is one
    and it computes small products in `packings` as the reference does, else the processor, with a
    warning that says why. RecipeError for anything else; MoeConvertError if what was named is not
    there or is wrong.
    """
    names = device_names(wish)
    if names == ["cpu"]:
        return []
    if names == ["auto"]:
        return _automatic(packings)
    known = [name for name in names if isinstance(name, str)]
    from loader.cuda.device.torch_device import cuda_devices

    opened = iter(cuda_devices(known, kept_root() / "gpu-kernels") if known else [])
    devices: list[Device] = [next(opened) if isinstance(name, str) else name for name in names]
    if not devices or len({device.name for device in devices}) < len(devices):
        raise RecipeError(f"device: {wish!r} does not name each GPU once")
    for device in devices:
        check_products(device, packings)
    return devices


def device_names(wish: Devices) -> list[str | Device]:
    """Return the devices of `wish` by their names, a `Device` as it is. RecipeError for what names
    none.
    """
    names = _names(wish)
    if names in (["auto"], ["cpu"]):
        return names
    for name in [name for name in names if isinstance(name, str)]:
        kind, _, number = name.partition(":")
        if kind != "cuda" or not (number.isdecimal() or name == "cuda"):
            raise RecipeError(
                f"device: {name!r} is unknown; known are auto, cpu, cuda, cuda:N and several of the last"
            )
    return names


def _names(wish: Devices) -> list[str | Device]:
    if wish is None:
        return ["auto"]
    if isinstance(wish, str):
        return [name.strip() for name in wish.split(",")]
    return [_name(one) for one in (wish if isinstance(wish, list | tuple) else [wish])]


def _name(one: Any) -> str | Device:
    """A device's name; a `Device` as it is."""
    if isinstance(one, torch.device):
        return "cpu" if one.type == "cpu" else str(one)
    if isinstance(one, int) and not isinstance(one, bool):
        return f"cuda:{one}"
    if isinstance(one, str) or hasattr(one, "torch_device"):
        known: str | Device = one
        return known
    raise RecipeError(f"device: {one!r} is no device", "name it as cpu, cuda, cuda:1 or auto")


def describe_gpus() -> str:
    """The GPUs that torch sees, or why there is none, in one line."""
    if not torch.cuda.is_available():
        return f"none: torch {torch.__version__} " + (
            "is built without CUDA" if torch.version.cuda is None else "finds none"
        )
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = [
        f"cuda:{i} {p.name}, {p.total_memory >> 20} MiB, sm_{p.major}{p.minor}"
        for i, p in enumerate(found)
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
