"""The RAM tier: a cache of experts in page-locked memory, between the files and the GPUs."""

from collections.abc import Callable

from torch import Tensor

from formats.artifact import Artifact
from formats.reading.reader import ExpertReader
from loader.cuda.experts.page_locked import PageLockedMemory
from loader.cuda.experts.tier_contents import TierContents
from loader.cuda.experts.tier_use import TierUse
from loader.experts.stats import TierStats

PIN_BYTES = 512 << 20
"""Bytes of one page-lock call.

torch would round each pinned allocation up to a power of two. One call for the whole tier would
take seconds before the first token.
"""


class PinnedTier:
    """A cache of experts in RAM over `reader`, which it closes. Copies to GPUs read from it.

    Implements `loader.experts.stats.TierCounters`. Thread safe, without a thread. If the system
    refuses to page-lock memory, the tier works without and logs one warning.
    """

    def __init__(
        self,
        reader: ExpertReader,
        counts: dict[int, int],
        pin: Callable[[Tensor], bool],
        unpin: Callable[[Tensor], None],
        *,
        piece_bytes: int = PIN_BYTES,
    ) -> None:
        """Make an empty tier.

        counts: number of experts by size in bytes (`expert_bytes_by_layer`), each at least 2: one
        for a demand read, one for a prefetch that a demand read interrupted. pin, unpin: as in
        `loader.cuda.device.device.Device`.
        """
        self.artifact: Artifact = reader.artifact
        self._contents = TierContents(reader, counts, PageLockedMemory(pin, unpin), piece_bytes)

    def use(self, layer: int, expert: int) -> TierUse:
        """Return a use of an expert, which the caller closes. Waits for nothing."""
        contents = self._contents
        with contents.lock:
            contents.end_copies()
            return TierUse(contents, layer, expert, contents.find(layer, expert))

    def find(self, layer: int, expert: int) -> TierUse | None:
        """Return a use of an expert in the tier; None if it is missing."""
        contents = self._contents
        with contents.lock:
            entry = contents.find(layer, expert)
            return TierUse(contents, layer, expert, entry) if entry else None

    def room(self, layer: int) -> int:
        """Return how many experts of a layer the CPU may hold at a time.

        Two buffers stay free for a demand read and an interrupted prefetch.
        """
        return self._contents.pool(layer).count - 2

    def stats(self) -> TierStats:
        """Return a snapshot of the counters."""
        with self._contents.lock:
            return self._contents.stats

    def reset_stats(self) -> None:
        """Set the counters to zero."""
        with self._contents.lock:
            self._contents.stats = TierStats(buffer_bytes=self._contents.stats.buffer_bytes)

    def close(self) -> None:
        """Close the reader and unlock the memory. No copy may be running."""
        self._contents.close()
