"""How fast the machine is that a plan is for: as the options say, else measured here."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from loader.planning.gpu_plan import GpuMachine
    from loader.planning.memory_plan import Machine, ModelSizes

GB = 10**9
TYPICAL = (
    "a link gives about 12 GB/s with PCIe 3 x16, about 25 with PCIe 4 x16; data sheets give a memory bandwidth of"
    " 300 GB/s for a T4, 360 for an RTX 3060, 1008 for an RTX 4090, 3350 for an H100"
)


def check_options(options: dict[str, Any], *, vram: bool) -> None:
    """UsageError for a speed that the plan does not use."""
    if vram and options["memory"]:
        raise click.UsageError(
            "--memory: not used with --vram: RAM gives what the link takes, and the GPU computes"
        )
    for name in ("link", "gpu_bandwidth"):
        if options[name] and not vram:
            raise click.UsageError(f"--{name.replace('_', '-')}: only with --vram")


def ram_machine(sizes: "ModelSizes", files: list[Path], options: dict[str, Any]) -> "Machine":
    """Of RAM and disk. UsageError if `files`, the weights, are none and the disk's speed is not
    given.
    """
    from loader.arithmetic.machine import memory_bytes_per_s
    from loader.planning.memory_plan import Machine

    disk, memory = _disk(sizes, files, options), options["memory"]
    return Machine(
        memory_bytes_per_s=memory * GB if memory else memory_bytes_per_s(), disk_bytes_per_s=disk
    )


def gpu_machine(
    sizes: "ModelSizes", files: list[Path], options: dict[str, Any], *, needs_disk: bool
) -> "GpuMachine":
    """Of link, GPU memory, and disk. UsageError as `ram_machine`, and for what is not given where
    there is no GPU.
    """
    from loader.planning.budget import expert_bytes_by_layer
    from loader.planning.gpu_plan import GpuMachine

    disk = _disk(sizes, files, options) if needs_disk else None
    link, memory = (options[name] and options[name] * GB for name in ("link", "gpu_bandwidth"))
    if not (link and memory):
        if not has_gpu():
            missing = [
                name
                for name, speed in (("--link GB/s", link), ("--gpu-bandwidth GB/s", memory))
                if not speed
            ]
            raise click.UsageError(
                f"there is no GPU here to measure: say {' and '.join(missing)}; {TYPICAL}"
            )
        from loader.cuda.device.speeds import link_bytes_per_s, memory_bytes_per_s
        from loader.cuda.device.torch_device import cuda_devices

        (device,) = cuda_devices(["cuda"])
        link = link or link_bytes_per_s(device, max(expert_bytes_by_layer(sizes.experts)))
        memory = memory or memory_bytes_per_s(device)
    return GpuMachine(link, memory, disk)


def has_gpu() -> bool:
    """Whether torch finds a CUDA GPU."""
    import torch

    return torch.cuda.is_available()


def _disk(sizes: "ModelSizes", files: list[Path], options: dict[str, Any]) -> float:
    from loader.arithmetic.machine import disk_bytes_per_s

    if options["disk"]:
        return float(options["disk"]) * GB
    if not files:
        raise click.UsageError(
            "there are no weights here to measure the disk with: say how fast it is, --disk GB/s"
        )
    return disk_bytes_per_s(files, int(max(sizes.stored)))
