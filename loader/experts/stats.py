"""Counters of the expert cache: hits, misses, evictions and bytes read, by layer and in total."""

from dataclasses import asdict, astuple, dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class LayerStats:
    """Counters of one layer. A hit or miss is one expert requested by one forward pass."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    bytes_read: int = 0
    """Stored bytes of the misses: read from the file, or first touched in its map."""
    guesses: int = 0
    """Prefetches begun."""
    useful_guesses: int = 0
    """Prefetched experts that were then requested; they count as misses too."""
    early_bytes: int = 0
    """Bytes of useful guesses that had been read before the request."""
    wasted_bytes: int = 0
    """Bytes read of the other guesses; not in `bytes_read`."""
    delays: int = 0
    """Demand reads that began while a guess was being read."""
    cpu_experts: int = 0
    """Misses of a GPU that the CPU computed from RAM."""

    @property
    def hit_ratio(self) -> float:
        """Hits divided by requests; 0.0 without requests."""
        requests = self.hits + self.misses
        return self.hits / requests if requests else 0.0

    @property
    def recall(self) -> float:
        """Useful guesses divided by misses; 0.0 without misses."""
        return self.useful_guesses / self.misses if self.misses else 0.0

    def __add__(self, other: "LayerStats") -> "LayerStats":
        return LayerStats(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class TierStats:
    """Counters of the RAM tier behind a GPU. Its requests are the misses of the GPU's slots."""

    buffer_bytes: int
    """Size of the tier."""
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    bytes_read: int = 0
    """Stored bytes of the misses, read from the files."""


class TierCounters(Protocol):
    """The part of a RAM tier that `ExpertCache` uses: its counters.

    `loader.cuda.experts.pinned_tier.PinnedTier` implements it.
    """

    def stats(self) -> TierStats:
        """Return a snapshot of the counters."""

    def reset_stats(self) -> None:
        """Set the counters to zero."""


@dataclass(frozen=True)
class PathStats:
    """Tokens by the code that computed them (`loader.decode`).

    decoder: by the native decoder. decoder_experts: reserved, always 0. transformers: by the code
    of transformers. reasons: why a token took that path -> tokens.
    """

    decoder: int = 0
    decoder_experts: int = 0
    transformers: int = 0
    reasons: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class MoeStats:
    """A snapshot of a model's counters.

    On a GPU the layers' bytes are those copied over its link. Copies that are only queued add
    nothing to `wait_s` and `busy_s`.
    """

    layers: tuple[LayerStats, ...]
    slots: tuple[int, ...]
    """Experts that each layer keeps in memory."""
    slot_bytes: int
    """Bytes of all slots."""
    wait_s: float = 0.0
    """Seconds that forward passes waited for reads."""
    busy_s: float = 0.0
    """Seconds with at least one read under way."""
    ram: TierStats | None = None
    """The RAM tier between the files and a GPU; None without a GPU."""
    paths: PathStats = field(default_factory=PathStats)
    kv_bits: int = 16
    """Bits of a number in the KV cache: 8, or 16 for the model's dtype, whatever its width."""

    @property
    def total(self) -> LayerStats:
        """Sum of the counters of all layers."""
        return sum(self.layers, LayerStats())

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, totals first.

        `ram` and `cpu_experts` are there only for a model on a GPU.
        """
        return {
            **self._values(self.total),
            "wait_s": self.wait_s,
            "busy_s": self.busy_s,
            "slots": sum(self.slots) / len(self.slots),
            "slot_bytes": self.slot_bytes,
            "kv_bits": self.kv_bits,
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
