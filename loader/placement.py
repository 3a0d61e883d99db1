"""Where a model's parts go: the expert cache, who computes what, and the way for single tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from formats.errors import RecipeError
from loader.backend import Backend, choose_backend
from loader.budget import check_slots, experts_aside, ram_budget, slots_of_folder
from loader.cache import ExpertCache
from loader.cuda.device import Device
from loader.policy import POLICIES
from loader.repository import OpenModel
from loader.torch_threads import Shortcut


@dataclass(frozen=True)
class CacheOptions:
    """As the arguments of `loader.from_pretrained`."""

    gpu_cache: int | str
    ram_cache: int | str
    slots: Sequence[int] | None
    io: str
    policy: str
    cpu_share: str
    check: str
    kernels: str


@dataclass(frozen=True)
class Placement:
    """backend: of the trunk, which is on `device`; experts: of each layer's experts. shortcut: for single tokens, not
    where layers are on several GPUs. gpus: of each layer, none without GPUs."""

    cache: ExpertCache
    backend: Backend
    experts: tuple[Backend, ...]
    device: torch.device
    shortcut: Shortcut | None
    gpus: tuple[Device, ...] = ()


def place(opened: OpenModel, devices: Sequence[Device], options: CacheOptions) -> Placement:
    """On `devices`, or on the CPU where there are none. Errors as `from_pretrained`."""
    return _on_gpus(opened, devices, options) if devices else _on_cpu(opened, options)


def _on_cpu(opened: OpenModel, options: CacheOptions) -> Placement:
    from loader.token_forward import one_token

    artifact, io, slots = opened.artifact, opened.io(options.io), options.slots
    backend = choose_backend(options.kernels)
    if slots is None:
        slots = slots_of_folder(artifact, ram_budget(options.ram_cache, artifact), io)
    else:
        check_slots(slots, artifact)
    if io == "auto":
        io = "mmap" if min(slots) == artifact.architecture.num_local_experts else "direct"
    reader = opened.reader(io, check=options.check)
    try:
        aside = experts_aside(artifact.architecture)
        cache = ExpertCache(reader, slots, aside=aside, policy=POLICIES[options.policy])
    except BaseException:
        reader.close()
        raise
    layers = artifact.architecture.num_hidden_layers
    return Placement(cache, backend, (backend,) * layers, torch.device("cpu"), one_token)


def _on_gpus(opened: OpenModel, devices: Sequence[Device], options: CacheOptions) -> Placement:
    from loader.cuda.stack import GpuExperts
    from loader.cuda.steps import one_token_on

    if opened.io(options.io) == "mmap":
        raise RecipeError(
            "io: 'mmap' maps pages that are not page-locked, which a GPU copies slowly", "use io='direct'"
        )
    reader = opened.reader("direct", check=options.check)
    try:
        found = GpuExperts.open(
            opened.artifact, reader, devices, gpu_cache=options.gpu_cache, ram_cache=options.ram_cache,
            slots=options.slots, policy=POLICIES[options.policy], cpu_share=options.cpu_share == "auto",
        )  # fmt: skip
    except BaseException:
        reader.close()
        raise
    shortcut = None
    if len(devices) == 1:
        cpu = choose_backend(options.kernels) if found.share else None
        shortcut = one_token_on(devices[0], found.trunk.products, found.share, cpu)
    return Placement(found.cache, found.trunk, found.backends, devices[0].torch_device, shortcut, found.devices)
