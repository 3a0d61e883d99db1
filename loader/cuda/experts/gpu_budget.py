"""What experts may take of GPUs' memory, and how layers are split between GPUs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from formats.errors import DoesNotFitError
from formats.sizes import parse_size
from loader.budget.expert_sizes import SizedExperts, expert_bytes_by_layer
from loader.budget.slot_counts import slots_by_layer
from loader.cuda.device.device import Device
from loader.experts.buffers import Memory, buffer_bytes

RESERVE_BYTES = 600 << 20
RESERVE_SHARE = 16
"""`auto` leaves free 600 MiB and 1/16 of the GPU's memory: for a KV cache of a few thousand
positions (128 KiB each in 8x7B), the activations of a prompt, the kernels, and what torch's
allocator loses between its blocks. torch's context is there already when memory is asked for.
Assumed, not measured.
"""

PIECE_BYTES = 512 << 20
"""Of one allocation for slots. All in one could only be given up as a whole when memory runs out;
one for each expert would leave torch's allocator with holes that fit nothing else.
"""


@dataclass(frozen=True)
class GpuSlots:
    """devices: of each layer. slots: of each layer. memory: of each layer, for `ExpertCache`."""

    devices: tuple[Device, ...]
    slots: tuple[int, ...]
    memory: tuple[Memory, ...]


def gpu_budget(gpu_cache: int | str, device: Device, least_bytes: int, trunk_bytes: int = 0) -> int:
    """The bytes that experts may take on `device`, where trunk_bytes more will be loaded.

    gpu_cache: a size for `parse_size`, or "auto": what is free, less the trunk, less a reserve
    (RESERVE_BYTES, RESERVE_SHARE). DoesNotFitError with all numbers if that is less than
    `least_bytes`, or more than is free.
    """
    free, total = device.memory()
    if gpu_cache == "auto":
        reserve = RESERVE_BYTES + total // RESERVE_SHARE
        budget = free - trunk_bytes - reserve
        need, parts = least_bytes, f"the trunk {trunk_bytes}, KV cache and activations {reserve}"
    else:
        reserve = 0
        budget = need = parse_size(gpu_cache, "gpu_cache")
        parts = f"the trunk {trunk_bytes}"
    if budget < least_bytes or trunk_bytes + reserve + need > free:
        need = max(need, least_bytes)
        raise DoesNotFitError(
            f"{device.name}: {free} of {total} bytes are free; {parts}, and experts {need} (on their way at least"
            f" {least_bytes}) take {trunk_bytes + reserve + need}",
            _hint(gpu_cache, least_bytes, free - trunk_bytes),
        )
    return budget


def gpu_slots(
    gpu_cache: int | str,
    devices: Sequence[Device],
    artifact: SizedExperts,
    staging: int,
    trunk_bytes: Sequence[int],
) -> GpuSlots:
    """Slots for `gpu_cache` on each of `devices`, of which layers get consecutive parts, as large
    as their budgets.

    trunk_bytes: what will be loaded on each. Errors as `gpu_budget`.
    """
    sizes = expert_bytes_by_layer(artifact)
    # A device's own layers are known only when its budget is: any size may be among them.
    least = staging * sum(buffer_bytes(size) for size in set(sizes))
    budgets = [
        gpu_budget(gpu_cache, *each)
        for each in zip(devices, [least] * len(devices), trunk_bytes, strict=True)
    ]
    numbers = split_layers(sizes, budgets)
    slots: list[int] = []
    for number, budget in enumerate(budgets):
        begin, count = len(slots), numbers.count(number)
        if count:
            layers = slice(begin, begin + count)
            slots += slots_by_layer(budget, artifact, staging, all_in_place=False, layers=layers)
    memory = [Memory(device.empty, PIECE_BYTES) for device in devices]
    return GpuSlots(
        tuple(devices[n] for n in numbers), tuple(slots), tuple(memory[n] for n in numbers)
    )


def split_layers(sizes: Sequence[int], budgets: Sequence[int]) -> list[int]:
    """For each layer, with experts of `sizes` bytes, its device's number: consecutive, in
    proportion to `budgets`.
    """
    ends = [sum(budgets[: number + 1]) / sum(budgets) for number in range(len(budgets))]
    total, before, result = sum(sizes), 0, []
    for size in sizes:
        middle = (before + size / 2) / total
        result.append(
            next(
                number for number, end in enumerate(ends) if middle < end or number == len(ends) - 1
            )
        )
        before += size
    return result


def _hint(gpu_cache: int | str, least_bytes: int, room: int) -> str:
    if room < least_bytes:
        return "free GPU memory, or use device='cpu', or convert to fewer bits"
    if gpu_cache == "auto":
        return f"give gpu_cache, {math.ceil(least_bytes / 2**20)}MiB at least, for a short context, or free GPU memory"
    return f"give gpu_cache of {math.ceil(least_bytes / 2**20)}MiB to {room // 2**20}MiB, or auto, or free GPU memory"
