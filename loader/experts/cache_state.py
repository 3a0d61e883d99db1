"""The state of an expert cache: its layers, its reads and who uses what, changed and mended as one."""

from collections.abc import Sequence

from loader.experts.fetcher import Fetcher
from loader.experts.reader_protocol import Reader
from loader.experts.slots import LayerSlots
from loader.experts.uses import Use, Uses


class CacheState:
    """What the methods of a cache change, each as one of `changes`.

    Truth is in a few places that an interrupt leaves whole: `Uses` says what is pinned,
    `LayerSlots.held` and `outside` what is in memory, the fetcher which jobs run. `_mend` computes
    everything else from them again.
    """

    def __init__(self, layers: Sequence[LayerSlots], fetcher: Fetcher, reader: Reader) -> None:
        self.layers, self.fetcher, self._reader = layers, fetcher, reader
        self.uses = Uses()
        self.wait_s = 0.0
        """Seconds in which a token or prompt waited for experts."""
        self.changes = fetcher.changes
        self.changes.mend = self._mend

    def begin(self, use: Use) -> None:
        """Begins a use, and ends the one that this thread was interrupted in."""
        if not self.uses.begin(use):
            self._mend()

    def give_up(self) -> None:
        """Ends the use that this thread was interrupted in, if it was."""
        if self.uses.give_up():
            self._mend()

    def make_room(self) -> None:
        """Ends what nobody waits for."""
        for slots in self.layers:
            if slots.outside:
                slots.drop_guesses(fills=True)

    def waited(self, seconds: float) -> None:
        """Counts a wait."""
        with self.changes.lock:
            self.wait_s += seconds

    def start_anew(self) -> None:
        """For a forked child. What was half done by a thread that is not here is mended before the
        first change.
        """
        self.fetcher.start_anew()
        self.uses.start_anew()
        self._reader.start_anew()

    def _mend(self) -> None:
        pins = self.uses.mend()
        self._reader.after_use([held.blob for held in self.uses.given_up if held.blob is not None])
        for slots in self.layers:
            slots.mend(pins)
        self.fetcher.mend(held.job for slots in self.layers for held in slots.entries() if held.job)
        for side in {id(slots.aside): slots.aside for slots in self.layers}.values():
            users = [slots for slots in self.layers if slots.aside is side]
            side.used = sum(len(slots.outside) for slots in users)
            if side.filling and not any(side.filling in slots.entries() for slots in users):
                side.filling = None
            if side.pool:
                taken = [held.buffer for slots in users for held in slots.entries()]
                # What is used or written to, though no layer holds it any more: it is given back
                # when that ends.
                taken += [held.buffer for held in pins] + [
                    job.buffer for job in self.fetcher.running()
                ]
                side.pool.mend(buffer for buffer in taken if buffer is not None)
        self.uses.given_up.clear()
        self.changes.ring()
