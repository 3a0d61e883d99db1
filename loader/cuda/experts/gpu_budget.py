"""GPU memory for experts: the budget of each GPU, and the split of layers between GPUs."""

from collections.abc import Sequence
from dataclasses import dataclass

from formats.errors import DoesNotFitError
from formats.sizes import parse_size, size_option
from loader.budget.expert_sizes import SizedExperts, expert_bytes_by_layer
from loader.budget.slot_counts import slots_by_layer
from loader.cuda.device.device import Device
from loader.experts.buffers import Memory, buffer_bytes

RESERVE_BYTES = 600 << 20
RESERVE_SHARE = 16
"""`auto` leaves 600 MiB and 1/16 of the GPU's memory free.

The reserve holds a KV cache of a few thousand positions (128 KiB each in 8x7B), a prompt's
activations, the kernels, and fragmentation in torch's allocator. torch's CUDA context exists before
the free memory is read. Both numbers are assumed, not measured.
"""

ALLOCATION_BYTES = 512 << 20
"""Bytes of one allocation for slots.

A single allocation could only be freed as a whole when memory runs out. One for each expert would
leave holes in torch's allocator that fit nothing else.
"""


@dataclass(frozen=True)
class GpuSlots:
    """The GPU, the number of slots and the memory of each layer, for `ExpertCache`."""

    devices: tuple[Device, ...]
    slots: tuple[int, ...]
    memory: tuple[Memory, ...]

    @classmethod
    def assign(
        cls, numbers: Sequence[int], slots: Sequence[int], devices: Sequence[Device]
    ) -> "GpuSlots":
        """Give each layer its GPU's memory. numbers: index into `devices` of each layer."""
        memory = [Memory(device.empty, ALLOCATION_BYTES) for device in devices]
        return cls(
            devices=tuple(devices[n] for n in numbers),
            slots=tuple(slots),
            memory=tuple(memory[n] for n in numbers),
        )


def gpu_expert_bytes(
    gpu_cache: int | str, device: Device, min_bytes: int, trunk_bytes: int = 0
) -> int:
    """Return the bytes that experts may take on `device`.

    gpu_cache: a size for `parse_size`, or "auto": the free memory, less the trunk, less a reserve
    (RESERVE_BYTES, RESERVE_SHARE). trunk_bytes: size of other weights that will be loaded there.
    Raises DoesNotFitError with all numbers if that is less than `min_bytes` or more than is free.
    """
    free, total = device.memory()
    if gpu_cache == "auto":
        reserve = RESERVE_BYTES + total // RESERVE_SHARE
        budget = free - trunk_bytes - reserve
        need = min_bytes
        parts = f"the trunk {trunk_bytes}, KV cache and activations {reserve}"
    else:
        reserve = 0
        budget = need = parse_size(gpu_cache, "gpu_cache")
        parts = f"the trunk {trunk_bytes}"
    if budget < min_bytes or trunk_bytes + reserve + need > free:
        need = max(need, min_bytes)
        raise DoesNotFitError(
            f"{device.name}: {free} of {total} bytes are free; {parts}, and experts {need} (staging"
            f" alone at least {min_bytes}) take {trunk_bytes + reserve + need}",
            _hint(gpu_cache, min_bytes, free - trunk_bytes),
        )
    return budget


def gpu_slots(
    gpu_cache: int | str,
    devices: Sequence[Device],
    artifact: SizedExperts,
    staging: int,
    trunk_bytes: Sequence[int],
) -> GpuSlots:
    """Return the slots for a budget of `gpu_cache` on each of `devices`.

    Each GPU gets consecutive layers, in proportion to its budget. staging: experts being read or
    used once on each GPU. trunk_bytes: size of other weights on each GPU. Raises the errors of
    `gpu_expert_bytes`.
    """
    sizes = expert_bytes_by_layer(artifact)
    # The layers of a GPU depend on its budget: any expert size may be among them.
    min_bytes = staging * sum(buffer_bytes(size) for size in set(sizes))
    budgets = [
        gpu_expert_bytes(gpu_cache, device, min_bytes, trunk)
        for device, trunk in zip(devices, trunk_bytes, strict=True)
    ]
    numbers = split_layers(sizes, budgets)
    slots: list[int] = []
    for number, budget in enumerate(budgets):
        begin = len(slots)
        count = numbers.count(number)
        if count:
            layers = slice(begin, begin + count)
            slots += slots_by_layer(budget, artifact, staging, all_in_place=False, layers=layers)
    return GpuSlots.assign(numbers, slots, devices)


def split_layers(sizes: Sequence[int], budgets: Sequence[int]) -> list[int]:
    """Return the number of each layer's GPU: consecutive layers, in proportion to `budgets`.

    sizes: bytes of one expert of each layer. budgets: bytes of each GPU.
    """
    ends = [sum(budgets[: number + 1]) / sum(budgets) for number in range(len(budgets))]
    last = len(ends) - 1
    total = sum(sizes)
    before = 0
    result = []
    for size in sizes:
        middle = (before + size / 2) / total
        result.append(next((n for n, end in enumerate(ends) if middle < end), last))
        before += size
    return result


def _hint(gpu_cache: int | str, min_bytes: int, room: int) -> str:
    least = size_option(min_bytes)
    if room < min_bytes:
        return "free GPU memory, or use device='cpu', or convert to fewer bits"
    if gpu_cache == "auto":
        return f"give gpu_cache, {least} at least, for a short context, or free GPU memory"
    return f"give gpu_cache of {least} to {room // 2**20}MiB, or auto, or free GPU memory"
