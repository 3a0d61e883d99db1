"""Experts' packed bytes in RAM: the same number of slots in each layer, filled from the files on demand."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from formats.artifact import Artifact
from formats.reader import ExpertReader
from loader.budget import expert_bytes_by_layer
from loader.policy import LruPolicy, Policy
from loader.stats import LayerStats, MoeStats


class ExpertSource(Protocol):
    """What the layers ask for experts; `ExpertCache` is the one that there is."""

    slots: int

    def get(self, layer: int, experts: Sequence[int]) -> dict[int, Tensor]:
        """The bytes of `experts` of `layer`: uint8 [n_bytes] each."""


@dataclass
class _Layer:
    policy: Policy
    lock: threading.Lock = field(default_factory=threading.Lock)
    blobs: dict[int, Tensor] = field(default_factory=dict)
    stats: LayerStats = field(default_factory=LayerStats)
    hits: int = 0
    """Of calls without a miss; the rest is in `stats`."""


class ExpertCache:
    """A cache of `slots` experts a layer over a reader.

    With `keep_views`, what the reader gives is kept as it is; without, it is copied, so that a slot over a map is
    memory of its own and what is evicted is given back. The masters are the files: eviction costs nothing.
    Thread safe; a blob stays valid for as long as it is held, also after its eviction.
    """

    def __init__(
        self,
        artifact: Artifact,
        reader: ExpertReader,
        slots: int,
        *,
        keep_views: bool = True,
        policy: Callable[[], Policy] = LruPolicy,
    ) -> None:
        if not 1 <= slots <= artifact.architecture.num_local_experts:
            raise ValueError(f"{slots} slots for {artifact.architecture.num_local_experts} experts a layer")
        self.slots = slots
        self._artifact = artifact
        self._reader = reader
        self._keep_views = keep_views
        self._slot_bytes = slots * sum(expert_bytes_by_layer(artifact))
        self._layers = [_Layer(policy()) for _ in range(artifact.architecture.num_hidden_layers)]

    def get(self, layer: int, experts: Sequence[int]) -> dict[int, Tensor]:
        """The packed bytes of the different `experts` of `layer`, uint8 [n_bytes] each, read-only; in the order given,
        the last one being the most recently used. At most `slots` at a time. Errors as `ExpertReader.read`.

        Hits are counted before misses come in, and no expert of this call makes room for another of it.
        """
        if len(experts) > self.slots or len(set(experts)) != len(experts):
            raise ValueError(f"asked for experts {list(experts)} of a cache with {self.slots} slots a layer")
        state = self._layers[layer]
        with state.lock:
            blobs = state.blobs
            if all(expert in blobs for expert in experts):
                # The usual case while decoding, kept short.
                state.hits += len(experts)
                for expert in experts:
                    state.policy.touch(expert)
                return {expert: blobs[expert] for expert in experts}
            misses = [expert for expert in experts if expert not in state.blobs]
            evictions = max(0, len(state.blobs) + len(misses) - self.slots)
            # First out, then in: the budget holds at every moment.
            for _ in range(evictions):
                del state.blobs[state.policy.victim(experts)]
            state.stats += LayerStats(hits=len(experts) - len(misses), evictions=evictions)
            for expert in misses:
                blob = self._read(layer, expert)
                # Known to the policy at once: if the next read fails, the two must not disagree.
                state.blobs[expert] = blob
                state.policy.touch(expert)
                state.stats += LayerStats(misses=1, bytes_read=self._artifact.entry(layer, expert).length)
            for expert in experts:
                state.policy.touch(expert)
            return {expert: state.blobs[expert] for expert in experts}

    def stats(self) -> MoeStats:
        """A snapshot of the counters."""
        return MoeStats(
            tuple(layer.stats + LayerStats(layer.hits) for layer in self._layers), self.slots, self._slot_bytes
        )

    def reset_stats(self) -> None:
        """Sets the counters to zero; the slots keep what they hold."""
        for layer in self._layers:
            with layer.lock:
                layer.stats, layer.hits = LayerStats(), 0

    def clear(self) -> None:
        """Empties all slots."""
        for layer in self._layers:
            with layer.lock:
                for _ in range(len(layer.blobs)):
                    del layer.blobs[layer.policy.victim(())]

    def _read(self, layer: int, expert: int) -> Tensor:
        blob = self._reader.read(layer, expert)
        stored_as_is = self._artifact.entry(layer, expert).codec == "none"
        return blob.clone() if stored_as_is and not self._keep_views else blob
