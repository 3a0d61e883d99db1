"""Experts' packed bytes in memory: slots in each layer, filled from the files on demand, and ahead
of it.
"""

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from formats.errors import MoeConvertError
from loader.cuda.experts.pinned_tier import PinnedTier
from loader.experts.buffers import RAM, BufferPool, Memory
from loader.experts.cache_state import CacheState
from loader.experts.fetcher import Fetcher
from loader.experts.giving_up import give_up
from loader.experts.lease import Lease
from loader.experts.policy import LrfuPolicy, Policy
from loader.experts.prefetch import Prefetcher
from loader.experts.reader_protocol import Reader
from loader.experts.slots import Aside, LayerSlots
from loader.experts.stats import LayerStats, MoeStats
from loader.experts.streaming import stream
from loader.forks import keep_over_forks
from loader.planning.budget import expert_bytes_by_layer


class ExpertSource(Protocol):
    """What the layers ask for experts; `ExpertCache` is the one that there is."""

    def lease(self, layer: int, experts: Sequence[int]) -> Lease:
        """One token's different `experts` of `layer`, by rank, for as long as the lease is held."""

    def used_again(self, layer: int, experts: int) -> None:
        """So many experts of an earlier lease were used, in a layer that none ever leaves."""

    def room(self, layer: int) -> int:
        """Return how many experts of `layer` one lease can hold."""

    def is_resident(self, layer: int) -> bool:
        """True if `layer` has a slot for each of its experts: none ever leaves."""

    def router_ahead(self, layer: int) -> tuple[Tensor, int] | None:
        """Asked for once a pass: what ranks the experts of layer + 1 from the input of the router
        of `layer` (`Prefetcher.router`), and how many of the first ones `guess` is to be given for
        one token. None where reading ahead would bring nothing.
        """

    def guess(self, layer: int, experts: Sequence[int]) -> None:
        """While a lease is held: begin to read those of `experts` that are not there, the first
        ones first.
        """

    def stream(
        self, layer: int, experts: Sequence[int], guesses: Sequence[int], *, ascending: bool
    ) -> Iterator[dict[int, Tensor]]:
        """Many tokens' different `experts` of `layer`, in the order of their last use
        (loader/experts/streaming.py); `guesses` are then read for the next one.
        """


class ExpertCache:
    """A cache over a reader, which it closes: `slots` experts in each layer (one number, or one for
    each layer), and at most `aside` experts more that are on their way or used once.

    Experts that need no buffer (`ExpertReader.in_place`) are used where they lie; others have
    buffers, as many as slots and `aside`, which come from `memory` (of each layer; layers with the
    same one share what is aside). Eviction costs nothing: the masters are the files. `tier` is
    where a GPU's reader gets its bytes, for the counters. Thread safe.

    A lease's experts are used by rank, the last one latest. Hits are counted before misses come in,
    and no expert of a lease makes room for another of it.
    """

    def __init__(
        self,
        reader: Reader,
        slots: int | Sequence[int],
        *,
        aside: int = 2,
        policy: Callable[[], Policy] = LrfuPolicy,
        memory: Sequence[Memory] | None = None,
        tier: PinnedTier | None = None,
    ) -> None:
        sizes = expert_bytes_by_layer(reader.artifact)
        experts = reader.artifact.architecture.num_local_experts
        counts = (slots,) * len(sizes) if isinstance(slots, int) else tuple(slots)
        if len(counts) != len(sizes) or not all(0 <= n <= experts for n in counts) or aside < 1:
            raise ValueError(
                f"{slots} slots and {aside} aside for {experts} experts in each of {len(sizes)} layers"
            )
        self._experts = experts
        self._memories = memory or [RAM] * len(sizes)
        sides = _sides(reader, sizes, counts, aside, self._memories)
        fetcher = Fetcher()
        self._layers = [
            LayerSlots(layer, count, policy(), side, reader, fetcher)
            for layer, (count, side) in enumerate(zip(counts, sides, strict=True))
        ]
        self._state, self._changes = CacheState(self._layers, fetcher, reader), fetcher.changes
        self._sizes, self._reader, self._tier = sizes, reader, tier
        self.prefetcher: Prefetcher | None = None
        self.close = weakref.finalize(self, _close, fetcher, reader)
        """Ends the reading threads and closes the files; also when the cache is collected."""
        keep_over_forks(self._state)

    @property
    def slots(self) -> tuple[int, ...]:
        """How many each layer has now."""
        return tuple(layer.slots for layer in self._layers)

    def lease(self, layer: int, experts: Sequence[int]) -> Lease:
        """One token's `experts`, at most `aside` more than the layer has slots, as a context: reads
        of misses start as it begins. Afterwards the slots hold the last of them.
        """
        return Lease(self._layers[layer], experts, self._state)

    def used_again(self, layer: int, experts: int) -> None:
        """So many experts of an earlier lease were used where they lie: hits. Only in a layer with
        a slot for each of its experts, which none ever leaves.
        """
        with self._changes.lock:
            self._layers[layer].hits += experts

    def room(self, layer: int) -> int:
        """As `ExpertSource.room`."""
        return self._layers[layer].most

    def is_resident(self, layer: int) -> bool:
        """As `ExpertSource.is_resident`."""
        return self._layers[layer].slots == self._experts

    def stream(
        self, layer: int, experts: Sequence[int], guesses: Sequence[int], *, ascending: bool
    ) -> Iterator[dict[int, Tensor]]:
        """Many tokens' experts, as many as there are, in parts (loader/experts/streaming.py)."""
        look_ahead = partial(self.guess, layer + 1, guesses)
        return stream(self._layers[layer], experts, self._state, look_ahead, ascending=ascending)

    def give_up(self) -> None:
        """Ends what this thread still uses: an interrupt may come at the first line of the end
        itself.
        """
        with self._changes.lock, self._changes:
            self._state.give_up()

    def router_ahead(self, layer: int) -> tuple[Tensor, int] | None:
        """As `ExpertSource.router_ahead`."""
        if not (prefetcher := self.prefetcher):
            return None
        if layer == 0:
            prefetcher.weigh([slots.stats for slots in self._layers])
        after = layer + 1
        if after == len(self._layers) or len(self._layers[after].held) == self._experts:
            return None
        router = prefetcher.router(layer)
        return None if router is None else (router, prefetcher.guesses)

    def guess(self, layer: int, experts: Sequence[int]) -> None:
        """Begins to read those of `experts` that are not there, the first ones first, while there
        is room aside.
        """
        if not experts:
            return
        with self._changes.lock, self._changes:
            # Guesses for other layers are leftovers of something that was interrupted.
            self._drop_guesses(but=layer)
            for expert in experts:
                if not self._layers[layer].guess(expert):
                    break

    def missing(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Those of `experts` that are neither there nor on their way."""
        slots = self._layers[layer]
        with self._changes.lock, self._changes:
            return [
                expert
                for expert in experts
                if expert not in slots.held and expert not in slots.outside
            ]

    def fill(self, layer: int, expert: int) -> None:
        """An expert that was missing was computed elsewhere: it is brought into a slot when nothing
        else moves, one at a time; what comes meanwhile is only counted.
        """
        with self._changes.lock, self._changes:
            self._layers[layer].fill(expert)

    def shrink(self, n_bytes: int, layer: int = 0) -> int:
        """Gives up slots of the layers whose memory is that of `layer`, evenly, until so many bytes
        are free, in whole allocations; how many are. What is in use stays, and what is aside;
        nothing is waited for.
        """
        with self._changes.lock, self._changes:
            layers = [
                slots
                for slots, memory in zip(self._layers, self._memories, strict=True)
                if memory is self._memories[layer]
            ]
            freed = give_up(layers, n_bytes, self._reader.before_free)
            self._changes.ring()
            return freed

    def stats(self) -> MoeStats:
        """A snapshot of the counters."""
        with self._changes.lock, self._changes:
            layers = tuple(layer.stats + LayerStats(layer.hits) for layer in self._layers)
            slot_bytes = sum(
                count * size for count, size in zip(self.slots, self._sizes, strict=True)
            )
            ram = self._tier.stats() if self._tier else None
            return MoeStats(
                layers, self.slots, slot_bytes, self._state.wait_s, self._state.fetcher.busy_s, ram
            )

    def reset_stats(self) -> None:
        """Sets the counters to zero; the slots keep what they hold."""
        with self._changes.lock, self._changes:
            for layer in self._layers:
                layer.stats, layer.hits = LayerStats(), 0
            self._state.wait_s = self._state.fetcher.busy_s = 0.0
        if self._tier:
            self._tier.reset_stats()

    def _drop_guesses(self, but: int) -> None:
        for slots in self._layers:
            if slots.outside and slots.layer != but:
                slots.drop_guesses()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExpertCache":
        """The cache itself: a copy of a model reads the same experts, which nobody changes."""
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise MoeConvertError(
            "a model whose experts come from a cache cannot be pickled, saved or sent to another process",
            f"load it in each process: loader.from_pretrained({os.fspath(self._reader.artifact.folder)!r})",
        )


def _sides(
    reader: Reader, sizes: Sequence[int], slots: Sequence[int], aside: int, memory: Sequence[Memory]
) -> list[Aside]:
    """What each layer shares with those of the same memory and expert size: the room beside the
    slots, the buffers.
    """
    in_place = all(reader.in_place(layer, 0) for layer in range(len(sizes)))
    kinds = [(id(place), size) for place, size in zip(memory, sizes, strict=True)]
    sides: dict[tuple[int, int], Aside] = {}
    for place, size, kind in zip(memory, sizes, kinds, strict=True):
        if kind not in sides:
            count = sum(n for n, other in zip(slots, kinds, strict=True) if other == kind)
            sides[kind] = Aside(aside, None if in_place else BufferPool(size, count + aside, place))
    return [sides[kind] for kind in kinds]


def _close(fetcher: Fetcher, reader: Reader) -> None:
    reader.stop()
    fetcher.close(reader.close)
