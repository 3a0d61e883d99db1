"""One expert in the cache."""

from dataclasses import dataclass

from torch import Tensor

from loader.experts.fetcher import Job


@dataclass(eq=False)
class CacheEntry:
    """An expert in memory (`blob`, uint8 [n_bytes]), or on its way there (`job`).

    An entry with `pins` is not evicted.
    """

    expert: int
    buffer: Tensor | None
    blob: Tensor | None = None
    error: BaseException | None = None
    job: Job | None = None
    pins: int = 0
    is_guess: bool = False
    """True for a prefetch that nobody has asked for yet."""
    is_fill: bool = False
    """True for an expert that the CPU computed for a GPU; it comes into a slot for the next use."""
    is_queued: bool = False
    """True if the copy that fills `blob` is queued, and `Reader.before_use` must order uses after
    it. False after the first use.
    """

    @property
    def is_fixed(self) -> bool:
        """True if the entry's memory is in use."""
        return bool(self.pins or self.job)
