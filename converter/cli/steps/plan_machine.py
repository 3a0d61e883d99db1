"""Speeds of the machine that a plan is for: from the options, else measured on this machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from converter.cli.show.console import GB

if TYPE_CHECKING:
    from loader.planning.gpu_plan import GpuMachine
    from loader.planning.memory_plan import Machine, ModelSizes

TYPICAL = (
    "typical links: 12 GB/s for PCIe 3 x16, 25 GB/s for PCIe 4 x16; GPU memory by data sheet:"
    " T4 300 GB/s, RTX 3060 360, RTX 4090 1008, H100 3350"
)


def check_options(options: dict[str, Any], *, vram: bool) -> None:
    """Raise UsageError for a speed that the plan does not use."""
    if vram and options["kv_bits"] == 8:
        raise click.UsageError("--kv-bits 8 does not apply to --vram: GPUs have no kernel for it")
    if vram and options["memory"]:
        raise click.UsageError(
            "--memory does not apply to --vram: the GPU computes, and the link is slower than RAM"
        )
    for name in ("link", "gpu_bandwidth"):
        if options[name] and not vram:
            raise click.UsageError(f"--{name.replace('_', '-')} needs --vram")


def ram_machine(sizes: "ModelSizes", files: list[Path], options: dict[str, Any]) -> "Machine":
    """Return the speeds of RAM and disk.

    files: weights to measure the disk with. UsageError if there are none and --disk is not given.
    """
    from loader.planning.memory_plan import Machine

    disk = _disk(sizes, files, options)
    if options["memory"]:
        return Machine(memory_bytes_per_s=options["memory"] * GB, disk_bytes_per_s=disk)
    # Measuring needs torch, which takes a second to import.
    from loader.arithmetic.machine import memory_bytes_per_s

    return Machine(memory_bytes_per_s=memory_bytes_per_s(), disk_bytes_per_s=disk)


def gpu_machine(
    sizes: "ModelSizes", files: list[Path], options: dict[str, Any], *, needs_disk: bool
) -> "GpuMachine":
    """Return the speeds of the link, the GPU's memory and the disk.

    UsageError as in `ram_machine`, and if an option is missing on a machine without a GPU.
    """
    from loader.budget.expert_sizes import expert_bytes_by_layer
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
                f"this machine has no GPU to measure: give {' and '.join(missing)}; {TYPICAL}"
            )
        from loader.cuda.device.speeds import link_bytes_per_s, memory_bytes_per_s
        from loader.cuda.device.torch_device import cuda_devices

        (device,) = cuda_devices(["cuda"])
        link = link or link_bytes_per_s(device, max(expert_bytes_by_layer(sizes.experts)))
        memory = memory or memory_bytes_per_s(device)
    return GpuMachine(link, memory, disk)


def has_gpu() -> bool:
    """True if torch finds a CUDA GPU."""
    import torch

    return torch.cuda.is_available()


def _disk(sizes: "ModelSizes", files: list[Path], options: dict[str, Any]) -> float:
    if options["disk"]:
        return float(options["disk"]) * GB
    if not files:
        raise click.UsageError(
            "no weights on this machine to measure the disk with: give its speed, --disk GB/s"
        )
    from loader.arithmetic.machine import disk_bytes_per_s

    return disk_bytes_per_s(files, int(max(sizes.stored)))
