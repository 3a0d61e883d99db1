"""One layer's experts in memory: those in slots, and those aside, on their way or used once. Its owner has a lock."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from formats.reader import ExpertReader
from loader.buffers import BufferPool
from loader.fetcher import Fetcher, Job
from loader.policy import Policy
from loader.stats import LayerStats


@dataclass(eq=False)
class Held:
    """An expert in memory (`blob`, uint8 [n_bytes]) or on its way there (`job`). It stays while it has `pins`."""

    expert: int
    buffer: Tensor | None
    blob: Tensor | None = None
    error: BaseException | None = None
    job: Job | None = None
    pins: int = 0
    in_slot: bool = False
    guess: bool = False
    """Read ahead, and not yet asked for."""


class Aside:
    """How many experts of one size may be outside of the slots, over all layers, and how many are."""

    def __init__(self, room: int, pool: BufferPool | None) -> None:
        self.room, self.pool, self.used = room, pool, 0


class LayerSlots:
    """Slots of one layer. An expert in a slot leaves it only for another one, chosen by `policy`."""

    def __init__(self, layer: int, slots: int, policy: Policy, aside: Aside, reader: ExpertReader, fetcher: Fetcher):
        self.layer, self.slots = layer, slots
        self.held: dict[int, Held] = {}
        """In slots. An expert whose read fails leaves."""
        self.outside: dict[int, Held] = {}
        self.stats = LayerStats()
        self.hits = 0
        """Experts that were in slots when they were asked for; the other counters are in `stats`."""
        self._policy, self._aside, self._reader, self._fetcher = policy, aside, reader, fetcher
        self._experts = reader.artifact.architecture.num_local_experts

    def count(self, **counts: int) -> None:
        """Adds to the counters."""
        self.stats = replace(self.stats, **{name: getattr(self.stats, name) + n for name, n in counts.items()})

    @property
    def most(self) -> int:
        """How many experts can be here at the same time, where no other layer has any on their way."""
        return self.slots + self._aside.room

    def has_room_for(self, experts: Collection[int]) -> bool:
        """Whether all of `experts` can be here at the same time, now."""
        free = self.slots - len(self._fixed().union(expert for expert in experts if expert in self.held))
        missing = [expert for expert in experts if expert not in self.held]
        aside = self._aside.room - self._aside.used + sum(expert in self.outside for expert in missing)
        return len(missing) - free <= aside

    def take(self, expert: int, keep: Collection[int]) -> Held | None:
        """The expert, there or on its way: in a slot if that takes none from `keep`, else aside; None if there is no
        room at the moment. Only for one of `keep` another expert leaves."""
        if held := self.held.get(expert):
            return held
        into_slot = self._can_free(keep) if expert in keep else len(self.held.keys() | set(keep)) < self.slots
        if held := self.outside.get(expert):
            self._ask_for(held)
            if into_slot:
                self._move_in(held, keep)
            return held
        if not into_slot and self._aside.used >= self._aside.room:
            return None
        # Out before in: the memory is bounded at every moment.
        if into_slot:
            self._free_slot(keep)
        held = self._start(expert)
        return self._put_into_slot(held) if into_slot else self._put_aside(held)

    def keep(self, held: Held, keep: Collection[int]) -> None:
        """Before a use of what `take` gave ends: one of `keep` that is aside comes into a slot, if one can be freed."""
        # One whose read failed is nowhere any more.
        if self.outside.get(held.expert) is held and held.pins == 1 and self._can_free(keep):
            self._move_in(held, keep)

    def end(self, held: Held) -> None:
        """Ends a use, the latest of its layer so far; what has no slot leaves with its last one."""
        held.pins -= 1
        if held.blob is not None and held.in_slot:
            self._policy.touch(held.expert)
        elif held.blob is not None and not held.pins:
            self._leave(held)

    def guess(self, expert: int) -> bool:
        """Reads ahead if the expert is not there and there is room aside; whether there was."""
        if expert in self.held or expert in self.outside:
            return True
        if self._aside.used >= self._aside.room:
            return False
        self._put_aside(self._start(expert, guess=True))
        self.count(guesses=1)
        return True

    def drop_guesses(self) -> None:
        """Ends the guesses that nobody asked for."""
        for held in [held for held in self.outside.values() if held.guess]:
            if held.job:
                self._fetcher.cancel(held.job)
            else:
                self.count(wasted_bytes=self._reader.artifact.entry(self.layer, held.expert).length)
                self._leave(held)

    def _fixed(self) -> set[int]:
        return {expert for expert, held in self.held.items() if held.pins or held.job}

    def _can_free(self, wanted: Collection[int]) -> bool:
        return len(self.held) < self.slots or len(self._fixed().union(wanted) & self.held.keys()) < len(self.held)

    def _free_slot(self, wanted: Collection[int]) -> None:
        if len(self.held) >= self.slots:
            self._evict(wanted)
            self.count(evictions=1)

    def _move_in(self, held: Held, wanted: Collection[int]) -> None:
        del self.outside[held.expert]
        self._aside.used -= 1
        self._free_slot(wanted)
        self._put_into_slot(held)

    def _put_into_slot(self, held: Held) -> Held:
        held.in_slot = True
        self.held[held.expert] = held
        return held

    def _evict(self, wanted: Collection[int]) -> None:
        held = self.held.pop(self._policy.victim(self._fixed().union(wanted)))
        held.in_slot = False
        self._release(held)

    def _start(self, expert: int, guess: bool = False) -> Held:
        in_place = self._reader.in_place(self.layer, expert)
        buffer = None if in_place or self._aside.pool is None else self._aside.pool.take()
        held = Held(expert, buffer, guess=guess)
        load = self._reader.load(self.layer, expert, buffer)
        held.job = Job(load, not guess, partial(self._finished, held))
        if not guess:
            self._count_miss(expert)
            self.count(delays=self._fetcher.guess_is_running)
        self._fetcher.submit(held.job)
        return held

    def _count_miss(self, expert: int) -> None:
        self.count(misses=1, bytes_read=self._reader.artifact.entry(self.layer, expert).length)

    def _ask_for(self, held: Held) -> None:
        """A guess was right."""
        if not held.guess:
            return
        held.guess = False
        entry = self._reader.artifact.entry(self.layer, held.expert)
        self._count_miss(held.expert)
        self.count(useful_guesses=1, early_bytes=held.job.load.done if held.job else entry.length)
        if held.job:
            self._fetcher.promote(held.job)

    def _put_aside(self, held: Held) -> Held:
        self._aside.used += 1
        self.outside[held.expert] = held
        return held

    def _finished(self, held: Held, blob: Tensor | None, error: BaseException | None) -> None:
        job, held.job = held.job, None
        held.blob, held.error = blob, error
        if blob is None:
            if held.guess and job:
                self.count(wasted_bytes=job.load.done)
            self._leave(held)
        elif held.in_slot and not held.pins:
            # Whoever asked for it was interrupted.
            self._policy.touch(held.expert)
        elif not held.in_slot and not held.pins and not held.guess:
            self._leave(held)

    def _leave(self, held: Held) -> None:
        if held.in_slot:
            del self.held[held.expert]
        elif self.outside.pop(held.expert, None) is held:
            self._aside.used -= 1
        self._release(held)

    def _release(self, held: Held) -> None:
        if held.buffer is None and self.slots < self._experts:
            self._reader.forget(self.layer, held.expert)
        elif held.buffer is not None and self._aside.pool:
            self._aside.pool.give_back(held.buffer)
        held.buffer = held.blob = None
