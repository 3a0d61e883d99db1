"""What the expert cache counted: hits, misses, evictions and bytes read, by layer and in total."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerStats:
    """One layer's counts. A hit or miss is one expert asked for by one forward pass of the layer.

    `bytes_read` are the stored bytes of the misses: what was read from the file, or first touched in its map.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    bytes_read: int = 0

    @property
    def hit_ratio(self) -> float:
        """Share of hits, 0.0 where nothing was asked for."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 0.0

    def __add__(self, other: "LayerStats") -> "LayerStats":
        return LayerStats(
            self.hits + other.hits,
            self.misses + other.misses,
            self.evictions + other.evictions,
            self.bytes_read + other.bytes_read,
        )


@dataclass(frozen=True)
class MoeStats:
    """A snapshot of a model's cache: `slots` experts a layer fit it, `slot_bytes` are what all slots can hold."""

    layers: tuple[LayerStats, ...]
    slots: int
    slot_bytes: int

    @property
    def total(self) -> LayerStats:
        """The sum over all layers."""
        return sum(self.layers, LayerStats())

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values for JSON, totals first."""
        total = self.total
        return {
            **asdict(total),
            "hit_ratio": total.hit_ratio,
            "slots": self.slots,
            "slot_bytes": self.slot_bytes,
            "layers": [{**asdict(layer), "hit_ratio": layer.hit_ratio} for layer in self.layers],
        }
