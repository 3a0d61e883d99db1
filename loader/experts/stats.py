"""What the expert cache counted: hits, misses, evictions and bytes read, by layer and in total."""

from dataclasses import asdict, astuple, dataclass, field
from typing import Any

from loader.decode.path_counters import PathStats


@dataclass(frozen=True)
class LayerStats:
    """One layer's counts. A hit or miss is one expert asked for by one forward pass of the layer.

    `bytes_read` are the stored bytes of the misses: what was read from the file, or first touched
    in its map.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    bytes_read: int = 0
    guesses: int = 0
    """Experts that were read ahead, or begun to be."""
    useful_guesses: int = 0
    """Those of them that were asked for; they are among the misses too."""
    early_bytes: int = 0
    """What of useful guesses had been read when they were asked for."""
    wasted_bytes: int = 0
    """What was read of the other guesses; not in `bytes_read`."""
    delays: int = 0
    """Reads on demand that began while a guess was being read."""
    cpu_experts: int = 0
    """Of a GPU's misses: experts that the CPU computed where they lay in RAM."""

    @property
    def hit_ratio(self) -> float:
        """Share of hits, 0.0 where nothing was asked for."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 0.0

    @property
    def recall(self) -> float:
        """Share of the misses that had been guessed, 0.0 where there were none."""
        return self.useful_guesses / self.misses if self.misses else 0.0

    def __add__(self, other: "LayerStats") -> "LayerStats":
        return LayerStats(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class TierStats:
    """What a GPU's RAM tier of `buffer_bytes` counted: a hit or miss is one expert that the GPU's
    slots lacked; `bytes_read` are the stored bytes of the misses, read from the files.
    """

    buffer_bytes: int
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    bytes_read: int = 0


@dataclass(frozen=True)
class MoeStats:
    """A snapshot of a model's cache: `slots` experts of each layer fit it, `slot_bytes` are what
    all slots can hold.

    `wait_s`: seconds in which a forward pass waited for reads. `busy_s`: seconds with a read under
    way. On a GPU the layers' bytes are those that went over its link, and copies that are only
    queued take none of these seconds; `ram` is the tier between the files and the GPU. paths:
    tokens by who computed them (loader/decode).
    """

    layers: tuple[LayerStats, ...]
    slots: tuple[int, ...]
    slot_bytes: int
    wait_s: float = 0.0
    busy_s: float = 0.0
    ram: TierStats | None = None
    paths: PathStats = field(default_factory=PathStats)

    @property
    def total(self) -> LayerStats:
        """The sum over all layers."""
        return sum(self.layers, LayerStats())

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values for JSON, totals first; what only a GPU has only if it is one."""
        return {
            **self._values(self.total),
            "wait_s": self.wait_s,
            "busy_s": self.busy_s,
            "slots": sum(self.slots) / len(self.slots),
            "slot_bytes": self.slot_bytes,
            "tokens": asdict(self.paths),
            "layers": [
                {**self._values(layer), "slots": slots}
                for layer, slots in zip(self.layers, self.slots, strict=True)
            ],
            **({"ram": asdict(self.ram)} if self.ram else {}),
        }

    def _values(self, stats: LayerStats) -> dict[str, Any]:
        values = {**asdict(stats), "hit_ratio": stats.hit_ratio, "recall": stats.recall}
        if not self.ram:
            del values["cpu_experts"]
        return values
