"""Experts' packed bytes in memory: slots in each layer, filled from the files on demand, and ahead of it."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

from torch import Tensor

from formats.reader import ExpertReader
from loader.budget import expert_bytes_by_layer
from loader.buffers import BufferPool
from loader.fetcher import Fetcher
from loader.lease import Lease
from loader.policy import LrfuPolicy, Policy
from loader.prefetch import Prefetcher
from loader.slots import Aside, LayerSlots
from loader.stats import LayerStats, MoeStats
from loader.streaming import stream


class ExpertSource(Protocol):
    """What the layers ask for experts; `ExpertCache` is the one that there is."""

    def lease(self, layer: int, experts: Sequence[int]) -> Lease:
        """One token's different `experts` of `layer`, by rank, for as long as the lease is held."""

    def used_again(self, layer: int, experts: int) -> None:
        """So many experts of an earlier lease were used, in a layer that none ever leaves."""

    def wants_to_guess(self, layer: int) -> bool:
        """Whether `look_ahead` from `layer` can bring anything."""

    def look_ahead(self, layer: int, x: Tensor) -> None:
        """While a lease is held: x [1, hidden] went into the router of `layer`, guess from it."""

    def stream(self, layer: int, experts: Sequence[int], x: Tensor, *, ascending: bool) -> Iterator[dict[int, Tensor]]:
        """Many tokens' different `experts` of `layer`, in the order of their last use (loader/streaming.py); the router
        saw x [T, hidden]."""


class ExpertCache:
    """A cache over a reader, which it closes: `slots` experts in each layer (one number, or one for each layer), and
    at most `aside` experts more that are on their way or used once.

    Experts that need no buffer (`ExpertReader.in_place`) are used where they lie; others have buffers, as many as
    slots and `aside`. Eviction costs nothing: the masters are the files. Thread safe.

    A lease's experts are used by rank, the last one latest. Hits are counted before misses come in, and no expert of a
    lease makes room for another of it.
    """

    def __init__(
        self,
        reader: ExpertReader,
        slots: int | Sequence[int],
        *,
        aside: int = 2,
        policy: Callable[[], Policy] = LrfuPolicy,
    ) -> None:
        sizes = expert_bytes_by_layer(reader.artifact)
        experts = reader.artifact.architecture.num_local_experts
        self.slots = (slots,) * len(sizes) if isinstance(slots, int) else tuple(slots)
        if len(self.slots) != len(sizes) or not all(0 <= n <= experts for n in self.slots) or aside < 1:
            raise ValueError(f"{slots} slots and {aside} aside for {experts} experts in each of {len(sizes)} layers")
        self._experts = experts
        self._fetcher = Fetcher()
        self._lock = self._fetcher.lock
        sides = _sides(reader, sizes, self.slots, aside)
        self._layers = [
            LayerSlots(layer, count, policy(), sides[sizes[layer]], reader, self._fetcher)
            for layer, count in enumerate(self.slots)
        ]
        self._slot_bytes = sum(count * size for count, size in zip(self.slots, sizes, strict=True))
        self._wait_s = 0.0
        self.prefetcher: Prefetcher | None = None
        self.close = weakref.finalize(self, _close, self._fetcher, reader)
        """Ends the reading threads and closes the files; also when the cache is collected."""

    def lease(self, layer: int, experts: Sequence[int]) -> Lease:
        """One token's `experts`, at most `aside` more than the layer has slots; what is missing is being read when this
        returns. Afterwards the slots hold the last of them."""
        with self._lock:
            return Lease(self._layers[layer], experts, self._lock, self._drop_guesses, self._waited)

    def used_again(self, layer: int, experts: int) -> None:
        """So many experts of an earlier lease were used where they lie: hits. Only in a layer with a slot for each of
        its experts, which none ever leaves."""
        with self._lock:
            self._layers[layer].hits += experts

    def stream(self, layer: int, experts: Sequence[int], x: Tensor, *, ascending: bool) -> Iterator[dict[int, Tensor]]:
        """Many tokens' experts, as many as there are, in parts (loader/streaming.py)."""
        return stream(
            self._layers[layer],
            experts,
            self._lock,
            self._drop_guesses,
            partial(self.look_ahead, layer, x),
            self._waited,
            ascending=ascending,
        )

    def wants_to_guess(self, layer: int) -> bool:
        """Whether `look_ahead` from `layer` can bring anything."""
        after = layer + 1
        return bool(self.prefetcher and after < len(self._layers) and len(self._layers[after].held) < self._experts)

    def look_ahead(self, layer: int, x: Tensor) -> None:
        """Begins to read what the prefetcher, if there is one, guesses from x [T, hidden], the router's input."""
        if not self.prefetcher or not self.wants_to_guess(layer):
            return
        if guesses := self.prefetcher.guess(layer, x):
            self.guess(layer + 1, guesses)
        if layer == 0:
            self.prefetcher.weigh([slots.stats for slots in self._layers])

    def guess(self, layer: int, experts: Sequence[int]) -> None:
        """Begins to read those of `experts` that are not there, the first ones first, while there is room aside."""
        with self._lock:
            # Guesses for other layers are leftovers of something that was interrupted.
            self._drop_guesses(but=layer)
            for expert in experts:
                if not self._layers[layer].guess(expert):
                    break

    def stats(self) -> MoeStats:
        """A snapshot of the counters."""
        with self._lock:
            layers = tuple(layer.stats + LayerStats(layer.hits) for layer in self._layers)
            return MoeStats(layers, self.slots, self._slot_bytes, self._wait_s, self._fetcher.busy_s)

    def reset_stats(self) -> None:
        """Sets the counters to zero; the slots keep what they hold."""
        with self._lock:
            for layer in self._layers:
                layer.stats, layer.hits = LayerStats(), 0
            self._wait_s = self._fetcher.busy_s = 0.0

    def _drop_guesses(self, but: int = -1) -> None:
        for slots in self._layers:
            if slots.outside and slots.layer != but:
                slots.drop_guesses()

    def _waited(self, seconds: float) -> None:
        self._wait_s += seconds


def _sides(reader: ExpertReader, sizes: list[int], slots: Sequence[int], aside: int) -> dict[int, Aside]:
    """Size of an expert -> what the layers with such experts share: the room beside the slots, and the buffers."""
    in_place = all(reader.in_place(layer, 0) for layer in range(len(sizes)))
    result = {}
    for size in set(sizes):
        count = sum(n for n, other in zip(slots, sizes, strict=True) if other == size)
        result[size] = Aside(aside, None if in_place else BufferPool(size, count + aside))
    return result


def _close(fetcher: Fetcher, reader: ExpertReader) -> None:
    fetcher.close()
    reader.close()
