"""The expert cache: slots in each layer, filled from the files on demand and ahead of it."""

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from formats.errors import MoeConvertError
from loader.budget.expert_sizes import expert_bytes_by_layer
from loader.experts.buffers import RAM, BufferPool, Memory
from loader.experts.cache_state import CacheState
from loader.experts.fetcher import Fetcher
from loader.experts.lease import Lease
from loader.experts.policy import LrfuPolicy, Policy
from loader.experts.prefetch import Prefetcher
from loader.experts.reader_protocol import Reader
from loader.experts.shrinking import free_slots
from loader.experts.slot_table import Staging
from loader.experts.slots import LayerSlots
from loader.experts.stats import LayerStats, MoeStats, TierCounters
from loader.experts.streaming import stream
from loader.lifetime.forks import keep_over_forks


class ExpertSource(Protocol):
    """The source of a model's experts, by layer. `ExpertCache` implements it."""

    def lease(self, layer: int, experts: Sequence[int]) -> Lease:
        """Return a lease of one token's different `experts` of `layer`, by rank."""

    def used_again(self, layer: int, experts: int) -> None:
        """Count hits of `experts` experts that were used without a lease.

        Only for a layer with a slot for each expert (`is_resident`): its experts never leave.
        """

    def room(self, layer: int) -> int:
        """Return how many experts of `layer` one lease can hold."""

    def is_resident(self, layer: int) -> bool:
        """True if `layer` has a slot for each of its experts, so that none ever leaves."""

    def router_ahead(self, layer: int) -> tuple[Tensor, int] | None:
        """Return what ranks the experts of layer + 1, and how many of the first ones to prefetch.

        The ranking matrix is that of `Prefetcher.router`; its input is the input of the router of
        `layer`. None if prefetching does not pay at present. Called once for each pass of `layer`.
        """

    def guess(self, layer: int, experts: Sequence[int]) -> None:
        """Prefetch those of `experts` that are missing, the first ones first.

        Called while a lease of the layer before is held.
        """

    def stream(
        self, layer: int, experts: Sequence[int], guesses: Sequence[int], *, ascending: bool
    ) -> Iterator[dict[int, Tensor]]:
        """Yield many tokens' different `experts` of `layer` in parts: number -> uint8 [n_bytes].

        experts: in the order of their last use. guesses: experts of layer + 1 to prefetch when this
        layer's reads are done. ascending: see loader/experts/streaming.py.
        """


class ExpertCache:
    """A cache of experts over a reader, which it closes. Thread safe.

    A lease uses its experts by rank, the last one latest. Hits are counted before misses are read,
    and no expert of a lease is evicted for another one of it. Eviction needs no write: the files
    hold every expert.
    """

    def __init__(
        self,
        reader: Reader,
        slots: int | Sequence[int],
        *,
        staging: int = 2,
        policy: Callable[[], Policy] = LrfuPolicy,
        memory: Sequence[Memory] | None = None,
        tier: TierCounters | None = None,
    ) -> None:
        """Allocate the buffers; the reading threads start with the first miss.

        slots: experts that each layer keeps, one number for all layers or one for each.
        staging: room for further experts, being read or used once (`Staging`). Layers with the same
        memory and expert size share it.
        policy: makes the eviction policy of a layer.
        memory: where each layer's buffers come from; None: RAM. Experts that the reader maps
        (`Reader.in_place`) need no buffers.
        tier: the RAM tier behind a GPU's cache, for its counters.
        Raises ValueError for impossible numbers, and the errors of `Memory.allocate`.
        """
        sizes = expert_bytes_by_layer(reader.artifact)
        experts = reader.artifact.architecture.num_local_experts
        counts = (slots,) * len(sizes) if isinstance(slots, int) else tuple(slots)
        if len(counts) != len(sizes) or not all(0 <= n <= experts for n in counts) or staging < 1:
            raise ValueError(
                f"{slots} slots and staging for {staging}: expected 0 to {experts} slots for each"
                f" of {len(sizes)} layers, and staging for at least 1"
            )
        self._experts = experts
        self._memories = memory or [RAM] * len(sizes)
        areas = _staging_areas(reader, sizes, counts, staging, self._memories)
        fetcher = Fetcher()
        self._layers = [
            LayerSlots(layer, count, policy(), area, reader, fetcher)
            for layer, (count, area) in enumerate(zip(counts, areas, strict=True))
        ]
        self._state = CacheState(self._layers, fetcher, reader)
        self._monitor = fetcher.monitor
        self._sizes = sizes
        self._reader = reader
        self._tier = tier
        self.prefetcher: Prefetcher | None = None
        self.close = weakref.finalize(self, _close, fetcher, reader)
        """Stops the reading threads and closes the files; also runs when the cache is collected."""
        keep_over_forks(self._state)

    @property
    def slots(self) -> tuple[int, ...]:
        """Slots of each layer at present."""
        return tuple(layer.slots for layer in self._layers)

    def lease(self, layer: int, experts: Sequence[int]) -> Lease:
        """Return a lease of one token's `experts`, a context manager.

        `experts` are at most `room(layer)`. Reads of misses start when the context is entered.
        Afterwards the slots hold the last of the experts.
        """
        return Lease(self._layers[layer], experts, self._state)

    def used_again(self, layer: int, experts: int) -> None:
        """Count hits of experts used without a lease (`ExpertSource.used_again`)."""
        with self._monitor.lock:
            self._layers[layer].hits += experts

    def room(self, layer: int) -> int:
        """Return how many experts of `layer` one lease can hold."""
        return self._layers[layer].max_experts

    def is_resident(self, layer: int) -> bool:
        """True if `layer` has a slot for each of its experts."""
        return self._layers[layer].slots == self._experts

    def stream(
        self, layer: int, experts: Sequence[int], guesses: Sequence[int], *, ascending: bool
    ) -> Iterator[dict[int, Tensor]]:
        """Yield many tokens' experts in parts (`ExpertSource.stream`)."""
        look_ahead = partial(self.guess, layer + 1, guesses)
        return stream(self._layers[layer], experts, self._state, look_ahead, ascending=ascending)

    def release_interrupted(self) -> None:
        """Release what this thread still pins: an interrupt can hit the end of a lease itself."""
        with self._monitor.lock, self._monitor:
            self._state.release_interrupted()

    def router_ahead(self, layer: int) -> tuple[Tensor, int] | None:
        """Return what ranks the next layer's experts (`ExpertSource.router_ahead`)."""
        prefetcher = self.prefetcher
        if not prefetcher:
            return None
        if layer == 0:
            prefetcher.weigh([slots.stats for slots in self._layers])
        after = layer + 1
        if after == len(self._layers) or len(self._layers[after].cached) == self._experts:
            return None
        router = prefetcher.router(layer)
        return None if router is None else (router, prefetcher.guesses)

    def guess(self, layer: int, experts: Sequence[int]) -> None:
        """Prefetch those of `experts` that are missing, as far as the staging area has room."""
        if not experts:
            return
        with self._monitor.lock, self._monitor:
            # Prefetches for other layers are left from an interrupted pass.
            self._drop_guesses(but=layer)
            for expert in experts:
                if not self._layers[layer].guess(expert):
                    break

    def missing(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Return those of `experts` that are neither in memory nor being read."""
        slots = self._layers[layer]
        with self._monitor.lock, self._monitor:
            return [
                expert
                for expert in experts
                if expert not in slots.cached and expert not in slots.staged
            ]

    def fill(self, layer: int, expert: int) -> None:
        """Count a miss that was computed elsewhere, and read the expert into a slot in background.

        One fill runs at a time, when no other read does. A miss meanwhile is only counted.
        """
        with self._monitor.lock, self._monitor:
            self._layers[layer].fill(expert)

    def shrink(self, n_bytes: int, layer: int = 0) -> int:
        """Free slots until `n_bytes` are free, and return the bytes freed.

        Takes slots evenly from all layers that share the memory of `layer`, in whole allocations.
        Experts in use and the staging area stay. Waits for nothing.
        """
        with self._monitor.lock, self._monitor:
            layers = [
                slots
                for slots, memory in zip(self._layers, self._memories, strict=True)
                if memory is self._memories[layer]
            ]
            freed_bytes = free_slots(layers, n_bytes, self._reader.before_free)
            self._monitor.notify_all()
            return freed_bytes

    def stats(self) -> MoeStats:
        """Return a snapshot of the counters."""
        with self._monitor.lock, self._monitor:
            sizes = zip(self.slots, self._sizes, strict=True)
            return MoeStats(
                layers=tuple(layer.stats + LayerStats(layer.hits) for layer in self._layers),
                slots=self.slots,
                slot_bytes=sum(count * size for count, size in sizes),
                wait_s=self._state.wait_s,
                busy_s=self._state.fetcher.busy_s,
                ram=self._tier.stats() if self._tier else None,
            )

    def reset_stats(self) -> None:
        """Set the counters to zero; the slots keep their experts."""
        with self._monitor.lock, self._monitor:
            for layer in self._layers:
                layer.stats = LayerStats()
                layer.hits = 0
            self._state.wait_s = 0.0
            self._state.fetcher.busy_s = 0.0
        if self._tier:
            self._tier.reset_stats()

    def _drop_guesses(self, but: int) -> None:
        for slots in self._layers:
            if slots.staged and slots.layer != but:
                slots.drop_guesses()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExpertCache":
        """Return the cache itself: experts never change, so a copy of a model can share them."""
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        folder = os.fspath(self._reader.artifact.folder)
        raise MoeConvertError(
            "a model whose experts come from a cache cannot be pickled, saved or sent to another"
            " process",
            f"load it in each process: loader.from_pretrained({folder!r})",
        )


def _staging_areas(
    reader: Reader,
    sizes: Sequence[int],
    slots: Sequence[int],
    staging: int,
    memory: Sequence[Memory],
) -> list[Staging]:
    """Return each layer's staging area. Layers of one memory and expert size share an area."""
    in_place = all(reader.in_place(layer, 0) for layer in range(len(sizes)))
    kinds = [(id(place), size) for place, size in zip(memory, sizes, strict=True)]
    areas: dict[tuple[int, int], Staging] = {}
    for place, size, kind in zip(memory, sizes, kinds, strict=True):
        if kind in areas:
            continue
        pool = None
        if not in_place:
            count = sum(n for n, other in zip(slots, kinds, strict=True) if other == kind)
            pool = BufferPool(size, count + staging, place)
        areas[kind] = Staging(staging, pool)
    return [areas[kind] for kind in kinds]


def _close(fetcher: Fetcher, reader: Reader) -> None:
    reader.stop()
    fetcher.close(reader.close)
