"""Measure a GPU's link, memory and kernels: copies of experts, copies during kernels, and products
in every packing.

GB/s of a kernel count the packed bytes that it reads. GB/s of a copy within the GPU count the bytes
read and written.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any

import torch
from gpu_clock import Clock, median_time
from make_checkpoint import Shape
from random_matrices import ExpertPool, generator_for, random_matrix
from torch import Tensor

from formats import ALIGNMENT_BYTES
from formats.expert import ExpertLayout
from formats.packing import Packing
from formats.reading.reader import aligned_bytes
from loader.cuda.device.device import Device
from loader.cuda.products.packed_products import Products
from loader.cuda.products.structures import LinearMatrix

Row = dict[str, Any]


class PinnedExpert:
    """Experts in page-locked RAM, more than a CPU cache holds, and a GPU buffer for one."""

    def __init__(self, device: Device, n_bytes: int, sources: int = 8) -> None:
        self._device = device
        self.n_bytes = -(-n_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self.target = device.empty(self.n_bytes)
        self.sources = [aligned_bytes(self.n_bytes).fill_(1) for _ in range(sources)]
        self.pinned = [source for source in self.sources if device.pin(source)]
        self._around = cycle(self.sources)

    def copy(self, _: int, stream: Any = None) -> None:
        """Queue a copy of the next expert."""
        self._device.copy(self.target, next(self._around), stream or self._device.compute_stream())

    def close(self) -> None:
        """Free the memory. Call it after the last copy has ended."""
        while self.pinned:
            self._device.unpin(self.pinned.pop())


def link(device: Device, clock: Clock, n_bytes: int, repeats: int = 20) -> Row:
    """GB/s of single copies of an expert from page-locked RAM."""
    expert = PinnedExpert(device, n_bytes)
    try:
        clock.time(expert.copy, len(expert.sources))
        seconds = [clock.time(expert.copy, 1).seconds for _ in range(repeats)]
        return {
            "bytes": expert.n_bytes,
            "page_locked": len(expert.pinned) == len(expert.sources),
            "gb_s": expert.n_bytes / statistics.median(seconds) / 1e9,
            "least_gb_s": expert.n_bytes / max(seconds) / 1e9,
            "most_gb_s": expert.n_bytes / min(seconds) / 1e9,
        }
    finally:
        device.compute_stream().synchronize()
        expert.close()


class DeviceCopy:
    """A copy within the GPU that is larger than its caches."""

    calls = 4

    def __init__(self, device: Device, n_bytes: int = 256 << 20) -> None:
        n_bytes = min(n_bytes, device.memory()[0] // 8)
        self._source, self._target = device.empty(n_bytes), device.empty(n_bytes)
        self.n_bytes = 2 * n_bytes

    def __call__(self, i: int) -> None:
        self._target.copy_(self._source)


def ring_bytes(device: Device) -> int:
    """Return the bytes of distinct weights for a ring: more than the GPU's caches hold."""
    return min(1 << 30, device.memory()[0] // 3)


def on_device(device: Device, host: Tensor) -> Tensor:
    """Return a copy of `host`, uint8, in the device's memory."""
    memory = device.empty(host.numel())
    memory.copy_(host)
    return memory


class ExpertsRing:
    """An even number of experts in the GPU's memory.

    Each call computes two of them, as one layer of Mixtral does.
    """

    def __init__(self, device: Device, layout: ExpertLayout, n_bytes: int) -> None:
        self.device, self.layout, self.products = device, layout, Products(device)
        packing = layout.gate_up
        assert isinstance(packing, Packing) and layout.down == packing
        host = ExpertPool(layout, generator_for(0, "pool")).draw(generator_for(0, "expert"))
        pairs = max(1, n_bytes // layout.n_bytes // 2)
        self.pairs = [(on_device(device, host), on_device(device, host)) for _ in range(pairs)]
        self.bytes_each_call = 2 * layout.n_bytes

    def call(self, tokens: int) -> Callable[[int], None]:
        """Queues a layer's two experts, all tokens through both."""
        place, hidden = self.device.torch_device, self.layout.hidden
        x = torch.randn((tokens, hidden), generator=torch.Generator().manual_seed(1)).to(place)
        weights, out = (
            torch.full((tokens, 2), 0.5, device=place),
            torch.zeros((tokens, hidden), device=place),
        )
        if tokens == 1:
            one = self.products.token_experts(
                self.layout, self.products.quantize(x), weights[0], out[0]
            )
            return lambda i: one.add(list(enumerate(self.pairs[i % len(self.pairs)])), first=True)
        index, layouts = (
            torch.tensor([[0, 1]]).repeat(tokens, 1),
            dict.fromkeys((0, 1), self.layout),
        )

        def run(i: int) -> None:
            self.products.add_experts(
                dict(enumerate(self.pairs[i % len(self.pairs)])), layouts, x, index, weights, out
            )

        return run


class AttentionRing:
    """Packed attention matrices of several layers; each call is one layer's q, k, v and o."""

    def __init__(self, device: Device, shape: Shape, packing: Packing, n_bytes: int) -> None:
        self.device, self.packing, self.products = device, packing, Products(device)
        self.hidden = shape.hidden
        narrow = shape.hidden // shape.heads * shape.kv_heads
        self.rows = shape.hidden, narrow, narrow, shape.hidden
        hosts = [random_matrix(packing, rows, shape.hidden).view(-1) for rows in self.rows]
        self.bytes_each_call = sum(host.numel() for host in hosts)
        layers = max(1, n_bytes // self.bytes_each_call)
        self.layers = [[on_device(device, host) for host in hosts] for _ in range(layers)]

    def call(self, tokens: int) -> Callable[[int], None]:
        """Queues a layer's four products of all tokens."""
        x = torch.randn((tokens, self.hidden), generator=torch.Generator().manual_seed(1))
        acts = self.products.quantize(x.to(self.device.torch_device))
        if tokens == 1:
            prepared = [self._prepared(acts, matrices) for matrices in self.layers]

            def run_one(i: int) -> None:
                for launch in prepared[i % len(prepared)]:
                    launch()

            return run_one

        def run(i: int) -> None:
            for tiles, rows in zip(self.layers[i % len(self.layers)], self.rows, strict=True):
                self.products.linear(acts, tiles, self.packing, rows, self.hidden)

        return run

    def _prepared(self, acts: Tensor, matrices: Sequence[Tensor]) -> list[Callable[[], None]]:
        """Return two launches: q, k and v together, then o."""
        entries = [
            LinearMatrix(
                tiles, self.packing, rows, torch.empty(rows, device=self.device.torch_device)
            )
            for tiles, rows in zip(matrices, self.rows, strict=True)
        ]
        return [
            self.products.prepare_linear(acts, part, self.hidden)
            for part in (entries[:3], entries[3:])
        ]


def beside_copy(
    clock: Clock,
    call: Callable[[int], object],
    calls: int,
    n_bytes: int,
    copy: DeviceCopy,
    pairs: int,
) -> Row:
    """Measure a kernel in turn with a copy within the GPU; the first pair is not counted.

    n_bytes: bytes that the kernel reads in a call.
    """
    times = [(clock.time(call, calls), clock.time(copy, copy.calls)) for _ in range(pairs + 1)][1:]
    rates = [(calls * n_bytes / a.seconds, copy.calls * copy.n_bytes / b.seconds) for a, b in times]
    return {
        "us": 1e6 * statistics.median(a.seconds for a, _ in times) / calls,
        "gb_s": statistics.median(kernel for kernel, _ in rates) / 1e9,
        "copy_gb_s": statistics.median(of_copy for _, of_copy in rates) / 1e9,
        "share": statistics.median(kernel / of_copy for kernel, of_copy in rates),
        "queued": all(a.queued and b.queued for a, b in times),
    }


def kernels(
    device: Device,
    clock: Clock,
    shape: Shape,
    packings: Sequence[Packing],
    n_bytes: int,
    few: Sequence[int] = (1, 2, 4, 8),
    many: Sequence[int] = (16, 64, 256, 1024),
    pairs: int = 5,
) -> Iterator[Row]:
    """Yield rows for every packing: a layer's two experts, and its attention.

    `few` tokens are compared with a copy, `many` tokens by arithmetic. weights_tokens_t_s: 10¹²
    weights times tokens per second, that is multiply-adds.
    """
    copy = DeviceCopy(device)
    for packing in packings:
        layout = ExpertLayout(shape.hidden, shape.intermediate, packing, packing)
        experts: Any = ExpertsRing(device, layout, n_bytes)
        yield from _of_ring(
            clock,
            "experts",
            packing,
            experts,
            2 * layout.n_weights,
            len(experts.pairs),
            copy,
            few,
            many,
            pairs,
        )
        del experts
        attention = AttentionRing(device, shape, packing, n_bytes)
        weights = sum(attention.rows) * shape.hidden
        yield from _of_ring(
            clock,
            "attention",
            packing,
            attention,
            weights,
            len(attention.layers),
            copy,
            few,
            many,
            pairs,
        )
        del attention


def _of_ring(
    clock: Clock,
    what: str,
    packing: Packing,
    ring: Any,
    weights: int,
    length: int,
    copy: DeviceCopy,
    few: Sequence[int],
    many: Sequence[int],
    pairs: int,
) -> Iterator[Row]:
    for tokens in few:
        found = beside_copy(
            clock, ring.call(tokens), max(length, 16), ring.bytes_each_call, copy, pairs
        )
        yield {"what": what, "packing": packing.name, "tokens": tokens, **found}
    for tokens in many:
        time = median_time(clock, ring.call(tokens), 2, 3)
        rate = weights * tokens / time.seconds / 1e12
        yield {
            "what": what, "packing": packing.name, "tokens": tokens, "us": 1e6 * time.seconds,
            "weights_tokens_t_s": rate, "queued": time.queued,
        }  # fmt: skip


def overlap(
    device: Device,
    clock: Clock,
    layout: ExpertLayout,
    n_bytes: int,
    copies: int = 4,
    most: int = 200,
) -> Row:
    """Copy experts while others are computed; return the time of both over that of the longer one.

    copies: number of copies. The number of layers computed meanwhile, at most `most`, takes about
    the same time.
    """
    ring, expert = ExpertsRing(device, layout, n_bytes), PinnedExpert(device, layout.n_bytes)
    stream, compute = device.new_stream(), device.compute_stream()
    one = ring.call(1)

    def work(layers: int, n_copies: int) -> Callable[[int], None]:
        def run(_: int) -> None:
            begin, end = device.new_event(), device.new_event()
            begin.record(compute)
            stream.wait_event(begin)
            for i in range(n_copies):
                expert.copy(i, stream)
            end.record(stream)
            for i in range(layers):
                one(i)
            compute.wait_event(end)

        return run

    try:
        copy_s = median_time(clock, work(0, copies), 1, 5).seconds
        layers = min(most, max(1, round(copy_s / median_time(clock, one, 16, 5).seconds)))
        rows = [
            [clock.time(work(*what), 1) for what in ((0, copies), (layers, 0), (layers, copies))]
            for _ in range(6)
        ]
        ratios = [both.seconds / max(a.seconds, b.seconds) for a, b, both in rows[1:]]
        copied, computed, both = (
            1e3 * statistics.median(row[i].seconds for row in rows[1:]) for i in range(3)
        )
        return {
            "copies": copies,
            "layers": layers,
            "copies_ms": copied,
            "kernels_ms": computed,
            "both_ms": both,
            "ratio": statistics.median(ratios),
            "queued": all(time.queued for row in rows[1:] for time in row),
        }
    finally:
        compute.synchronize()
        expert.close()
