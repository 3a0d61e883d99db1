"""Chooses where a model's parts go: expert cache, backends and decoder, on the CPU or on GPUs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from formats.errors import RecipeError
from loader.arithmetic.backend import Backend, choose_backend
from loader.budget.expert_sizes import staging_experts
from loader.budget.ram import ram_budget
from loader.budget.slot_counts import check_slots, slots_of_folder
from loader.cuda.device.device import Device
from loader.decode.decoder import DecoderFactory
from loader.decode.path_counters import LeaveDecoder, Reason
from loader.experts.cache import ExpertCache
from loader.experts.policy import POLICIES
from loader.hf.served_model import Retry
from loader.repository import OpenModel


@dataclass(frozen=True)
class CacheOptions:
    """Arguments of `loader.from_pretrained` that concern the cache and the products."""

    gpu_cache: int | str
    ram_cache: int | str
    slots: Sequence[int] | None
    io: str
    policy: str
    cpu_share: str
    check: str
    kernels: str
    reserve_bytes: int = 0


@dataclass(frozen=True)
class Placement:
    """The devices of a model's parts, and the backends that compute them.

    backend: computes the trunk's products, on `device`. experts: backend of each layer's experts.
    decoders: makes the decoder of single tokens, or says why there is none. retry: repeats a pass
    for which a GPU had too little memory; None on the CPU.
    """

    cache: ExpertCache
    backend: Backend
    experts: tuple[Backend, ...]
    device: torch.device
    decoders: DecoderFactory | LeaveDecoder
    retry: Retry | None = None


def place(opened: OpenModel, devices: Sequence[Device], options: CacheOptions) -> Placement:
    """Place a model on the GPUs `devices`, or on the CPU if there are none.

    Raises the errors of `from_pretrained`.
    """
    return _on_gpus(opened, devices, options) if devices else _on_cpu(opened, options)


def _on_cpu(opened: OpenModel, options: CacheOptions) -> Placement:
    artifact = opened.artifact
    io = opened.io(options.io)
    slots = options.slots
    backend = choose_backend(options.kernels)
    if slots is None:
        budget = ram_budget(options.ram_cache, artifact, reserve_bytes=options.reserve_bytes)
        slots = slots_of_folder(artifact, budget, io)
    else:
        check_slots(slots, artifact)
    if io == "auto":
        io = "mmap" if min(slots) == artifact.architecture.num_local_experts else "direct"
    reader = opened.reader(io, check=options.check)
    try:
        staging = staging_experts(artifact.architecture)
        cache = ExpertCache(reader, slots, staging=staging, policy=POLICIES[options.policy])
    except BaseException:
        reader.close()
        raise
    layers = artifact.architecture.expert_layers
    return Placement(
        cache, backend, (backend,) * layers, torch.device("cpu"), _cpu_decoders(backend)
    )


def _on_gpus(opened: OpenModel, devices: Sequence[Device], options: CacheOptions) -> Placement:
    from loader.cuda.decode.decoder_factory import CudaDecoderFactory
    from loader.cuda.experts.out_of_memory import MemoryRetry
    from loader.cuda.experts.stack import GpuExperts

    if opened.io(options.io) == "mmap":
        raise RecipeError(
            "io: 'mmap' maps pages that are not page-locked, which a GPU copies slowly",
            "use io='direct'",
        )
    reader = opened.reader("direct", check=options.check)
    try:
        experts = GpuExperts.open(
            opened.artifact,
            reader,
            devices,
            gpu_cache=options.gpu_cache,
            ram_cache=options.ram_cache,
            slots=options.slots,
            policy=POLICIES[options.policy],
            cpu_share=options.cpu_share == "auto",
            reserve_bytes=options.reserve_bytes,
        )
    except BaseException:
        reader.close()
        raise
    decoders: DecoderFactory | LeaveDecoder = LeaveDecoder(Reason.DEVICES, f"{len(devices)} GPUs")
    if len(devices) == 1:
        cpu = choose_backend(options.kernels) if experts.share else None
        decoders = CudaDecoderFactory(devices[0], experts.trunk.products, experts.share, cpu)
    retry = MemoryRetry(experts.cache, experts.devices)
    return Placement(
        experts.cache, experts.trunk, experts.backends, devices[0].torch_device, decoders, retry
    )


def _cpu_decoders(backend: Backend) -> DecoderFactory | LeaveDecoder:
    if backend.name != "native":
        return LeaveDecoder(Reason.KERNELS, f"the {backend.name} backend computes products")
    from loader.decode.cpu import CpuDecoderFactory

    return CpuDecoderFactory(backend)
