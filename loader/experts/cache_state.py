"""The state of an expert cache: layers, reads and pins, changed and repaired together."""

from collections.abc import Sequence

from loader.experts.fetcher import Fetcher
from loader.experts.pins import PinHolder, PinRegistry
from loader.experts.reader_protocol import Reader
from loader.experts.slots import LayerSlots


class CacheState:
    """The state that a cache's methods change, each under `monitor`.

    A few places hold the truth, and no interrupt leaves them half changed: `PinRegistry` (pins),
    `SlotTable.cached` and `SlotTable.staged` (experts in memory), the fetcher (running jobs).
    `_repair` computes everything else from them.
    """

    def __init__(self, layers: Sequence[LayerSlots], fetcher: Fetcher, reader: Reader) -> None:
        self.layers = layers
        self.fetcher = fetcher
        self._reader = reader
        self.pins = PinRegistry()
        self.wait_s = 0.0
        """Seconds that tokens and prompts waited for experts."""
        self.monitor = fetcher.monitor
        self.monitor.repair = self._repair

    def begin(self, holder: PinHolder) -> None:
        """Register a pin holder, and release one in which this thread was interrupted."""
        if not self.pins.begin(holder):
            self._repair()

    def release_interrupted(self) -> None:
        """Release the pin holder in which this thread was interrupted, if any."""
        if self.pins.release_interrupted():
            self._repair()

    def make_room(self) -> None:
        """Cancel prefetches and fills."""
        for slots in self.layers:
            if slots.staged:
                slots.drop_guesses(fills=True)

    def count_wait(self, seconds: float) -> None:
        """Add to the time spent waiting."""
        with self.monitor.lock:
            self.wait_s += seconds

    def start_anew(self) -> None:
        """Prepare for use in a forked child.

        The next change repairs what the parent's other threads left half done.
        """
        self.fetcher.start_anew()
        self.pins.start_anew()
        self._reader.start_anew()

    def _repair(self) -> None:
        pins = self.pins.repair()
        self._reader.after_use([e.blob for e in self.pins.released if e.blob is not None])
        for slots in self.layers:
            slots.repair(pins)
        jobs = [e.job for slots in self.layers for e in slots.entries() if e.job]
        self.fetcher.repair(jobs)
        for staging in {id(slots.staging): slots.staging for slots in self.layers}.values():
            users = [slots for slots in self.layers if slots.staging is staging]
            staging.used = sum(len(slots.staged) for slots in users)
            if staging.filling and not any(staging.filling in slots.entries() for slots in users):
                staging.filling = None
            if staging.pool:
                buffers = [entry.buffer for slots in users for entry in slots.entries()]
                # Buffers in use that no layer holds any more: given back when the use ends.
                buffers += [entry.buffer for entry in pins]
                buffers += [job.buffer for job in self.fetcher.running()]
                staging.pool.repair(buffer for buffer in buffers if buffer is not None)
        self.pins.released.clear()
        self.monitor.notify_all()
