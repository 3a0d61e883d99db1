"""Page-locked host memory, which a GPU copies from without the CPU's help."""

import logging
from collections.abc import Callable

from torch import Tensor

from formats.reading.reader import aligned_bytes

_log = logging.getLogger(__name__)


class PageLockedMemory:
    """Allocates host memory and page-locks it.

    pin, unpin: as in `loader.cuda.device.device.Device`. After the first refusal all further memory
    stays unlocked; one warning says so. Not thread safe: the owner has a lock.
    """

    def __init__(self, pin: Callable[[Tensor], bool], unpin: Callable[[Tensor], None]) -> None:
        self._pin = pin
        self._unpin = unpin
        self._pinned: dict[int, Tensor] = {}
        """Locked memory by address."""
        self._is_refused = False

    def allocate(self, n_bytes: int) -> Tensor:
        """Return uint8 [n_bytes] on a page boundary, page-locked if the system allows it."""
        memory = aligned_bytes(n_bytes)
        if self._is_refused:
            return memory
        if self._pin(memory):
            self._pinned[memory.data_ptr()] = memory
        else:
            self._is_refused = True
            _log.warning(
                "%d bytes of RAM could not be page-locked: copies to the GPU will be slower",
                n_bytes,
            )
        return memory

    def is_pinned(self, memory: Tensor) -> bool:
        """True if `memory`, a result of `allocate`, is page-locked."""
        return memory.data_ptr() in self._pinned

    def unpin_all(self) -> None:
        """Unlock all memory. No copy may be running."""
        for memory in self._pinned.values():
            self._unpin(memory)
        self._pinned.clear()
