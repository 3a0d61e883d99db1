"""One layer's experts in memory: those in slots, and those aside, on their way or used once. Its
owner has a lock.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from loader.experts.buffers import BufferPool, Piece
from loader.experts.fetcher import Fetcher, Job
from loader.experts.policy import Policy
from loader.experts.reader_protocol import Load, Reader
from loader.experts.stats import LayerStats


@dataclass(eq=False)
class Held:
    """An expert in memory (`blob`, uint8 [n_bytes]) or on its way there (`job`). It stays while it
    has `pins`.
    """

    expert: int
    buffer: Tensor | None
    blob: Tensor | None = None
    error: BaseException | None = None
    job: Job | None = None
    pins: int = 0
    guess: bool = False
    """Read ahead, and not yet asked for."""
    fill: bool = False
    """Was computed elsewhere, and comes into a slot for the next time."""
    queued: bool = False
    """`blob` is there for whoever waits in the reader's way (`Reader.before_use`); not used until
    now.
    """

    @property
    def is_fixed(self) -> bool:
        """Whether its memory is in use."""
        return bool(self.pins or self.job)


class Aside:
    """How many experts of one size may be outside of the slots, over all layers that share them,
    and how many are.
    """

    def __init__(self, room: int, pool: BufferPool | None) -> None:
        self.room, self.pool, self.used = room, pool, 0
        self.filling: Held | None = None
        """The latest fill."""


class LayerSlots:
    """Slots of one layer. An expert in a slot leaves it only for another one, chosen by `policy`."""

    def __init__(
        self, layer: int, slots: int, policy: Policy, aside: Aside, reader: Reader, fetcher: Fetcher
    ):
        self.layer, self.slots, self.aside = layer, slots, aside
        self.held: dict[int, Held] = {}
        """In slots. An expert whose read fails leaves."""
        self.outside: dict[int, Held] = {}
        self.stats = LayerStats()
        self.hits = 0
        """Experts that were in slots when they were asked for; the other counters are in `stats`.
        """
        self._policy, self._reader, self._fetcher = policy, reader, fetcher
        self._experts = reader.artifact.architecture.num_local_experts

    def count(self, **counts: int) -> None:
        """Adds to the counters."""
        self.stats = replace(
            self.stats, **{name: getattr(self.stats, name) + n for name, n in counts.items()}
        )

    @property
    def most(self) -> int:
        """How many experts can be here at the same time, where no other layer has any on their way."""
        return self.slots + self.aside.room

    def has_room_for(self, experts: Collection[int]) -> bool:
        """Whether all of `experts` can be here at the same time, now."""
        free = self.slots - len(
            self._fixed().union(expert for expert in experts if expert in self.held)
        )
        missing = [expert for expert in experts if expert not in self.held]
        aside = (
            self.aside.room - self.aside.used + sum(expert in self.outside for expert in missing)
        )
        return len(missing) - free <= aside

    def take(self, expert: int, keep: Collection[int]) -> Held | None:
        """The expert, there or on its way: in a slot if that takes none from `keep`, else aside;
        None if there is no room at the moment. Only for one of `keep` another expert leaves.
        """
        if held := self.held.get(expert):
            return held
        into_slot = (
            self._can_free(keep)
            if expert in keep
            else len(self.held.keys() | set(keep)) < self.slots
        )
        if held := self.outside.get(expert):
            self._ask_for(held)
            if into_slot:
                self._move_in(held, keep)
            return held
        if not into_slot and self.aside.used >= self.aside.room:
            return None
        # Out before in: the memory is bounded at every moment.
        if into_slot:
            self._free_slot(keep)
        held = self._start(expert)
        if into_slot:
            self._put_into_slot(held)
        else:
            self._put_aside(held)
        if held.error:
            self._leave(held)
        return held

    def keep(self, held: Held, keep: Collection[int]) -> None:
        """Before a use of what `take` gave ends: one of `keep` that is aside comes into a slot, if
        one can be freed.
        """
        # One whose read failed is nowhere any more.
        if self.outside.get(held.expert) is held and held.pins == 1 and self._can_free(keep):
            self._move_in(held, keep)

    def is_in_slot(self, held: Held) -> bool:
        """Whether it has a slot: else it is aside, or nowhere."""
        return self.held.get(held.expert) is held

    def end(self, held: Held) -> None:
        """Ends a use, the latest of its layer so far; what has no slot leaves with its last one."""
        held.pins -= 1
        held.queued = False
        if held.blob is not None and self.is_in_slot(held):
            self._policy.touch(held.expert)
        elif held.blob is not None and not held.pins:
            self._leave(held)

    def guess(self, expert: int) -> bool:
        """Reads ahead if the expert is not there and there is room aside; whether there was."""
        if expert in self.held or expert in self.outside:
            return True
        if self.aside.used >= self.aside.room:
            return False
        held = self._start(expert, urgent=False)
        held.guess = True
        self._put_aside(held)
        self.count(guesses=1)
        return True

    def fill(self, expert: int) -> None:
        """An expert that was missing was computed elsewhere. Brings it into a slot, unless another
        one is on its way so, or there is no room aside; what is urgent comes first.
        """
        self.count(misses=1, cpu_experts=1)
        busy = self.aside.filling and self.aside.filling.job
        if (
            busy
            or expert in self.held
            or expert in self.outside
            or self.aside.used >= self.aside.room
        ):
            return
        self.aside.filling = held = self._start(expert, urgent=False)
        held.fill = True
        self._put_aside(held)

    def drop_guesses(self, fills: bool = False) -> None:
        """Ends the guesses that nobody asked for, and with `fills` what comes in without hurry."""
        for held in [held for held in self.outside.values() if held.guess or (fills and held.fill)]:
            if held.job:
                self._fetcher.cancel(held.job)
            else:
                self.count(wasted_bytes=self._reader.moved_bytes(self.layer, held.expert))
                self._leave(held)

    def before_use(self, blobs: Iterable[Tensor]) -> None:
        """As `Reader.before_use`."""
        self._reader.before_use(blobs)

    def after_use(self, entries: Iterable[Held]) -> None:
        """As `Reader.after_use`; of those that are there."""
        self._reader.after_use([held.blob for held in entries if held.blob is not None])

    def lower(self) -> bool:
        """Gives up a slot, the policy's choice; False if all are in use."""
        if not self.slots or not self._can_free(()):
            return False
        self._free_slot(())
        self.slots -= 1
        return True

    def clear(self, piece: Piece) -> None:
        """Gives up the experts in `piece`, none of which is in use; the slots stay."""
        for held in [held for held in self.held.values() if self._is_in(piece, held)]:
            self._evict(self.held.keys() - {held.expert})
            self.count(evictions=1)

    def uses(self, piece: Piece) -> bool:
        """Whether memory of `piece` is in use."""
        return any(held.is_fixed and self._is_in(piece, held) for held in self.entries())

    def entries(self) -> list[Held]:
        """All that is here or on its way."""
        return [*self.held.values(), *self.outside.values()]

    def mend(self, pins: Mapping[Held, int]) -> None:
        """Makes it consistent, whatever was done of a change: what is neither there nor on its way
        is no longer held, nor what was aside and used; the others have these `pins`. The owner
        mends jobs and buffers afterwards.
        """
        for held in self.entries():
            held.pins = pins.get(held, 0)
        for expert, held in list(self.held.items()):
            if held.blob is None and not held.job:
                del self.held[expert]
        for expert, held in list(self.outside.items()):
            is_wanted = held.job or (held.blob is not None and (held.pins or held.guess))
            if expert in self.held or not is_wanted:
                del self.outside[expert]
        self._policy.settle([expert for expert, held in self.held.items() if held.blob is not None])

    @property
    def most_to_lower(self) -> int:
        """How often `lower` would succeed."""
        return self.slots - len(self._fixed())

    def _is_in(self, piece: Piece, held: Held) -> bool:
        pool = self.aside.pool
        return held.buffer is not None and pool is not None and pool.piece_of(held.buffer) is piece

    def _fixed(self) -> set[int]:
        return {expert for expert, held in self.held.items() if held.is_fixed}

    def _can_free(self, wanted: Collection[int]) -> bool:
        return len(self.held) < self.slots or len(
            self._fixed().union(wanted) & self.held.keys()
        ) < len(self.held)

    def _free_slot(self, wanted: Collection[int]) -> None:
        if len(self.held) >= self.slots:
            self._evict(wanted)
            self.count(evictions=1)

    def _move_in(self, held: Held, wanted: Collection[int]) -> None:
        del self.outside[held.expert]
        self.aside.used -= 1
        self._free_slot(wanted)
        self._put_into_slot(held)

    def _put_into_slot(self, held: Held) -> None:
        self.held[held.expert] = held

    def _evict(self, wanted: Collection[int]) -> None:
        held = self.held.pop(self._policy.victim(self._fixed().union(wanted)))
        self._release(held)

    def _start(self, expert: int, urgent: bool = True) -> Held:
        in_place = self._reader.in_place(self.layer, expert)
        buffer = None if in_place or self.aside.pool is None else self.aside.pool.take()
        held = Held(expert, buffer)
        load = self._reader.load(self.layer, expert, buffer)
        if urgent:
            self._count_miss(expert)
            self.count(delays=self._fetcher.guess_is_running)
        if urgent and load.at_once:
            self._queue(held, load)
        else:
            job = Job(load, urgent, partial(self._finished, held), buffer)
            self._fetcher.submit(job)
            held.job = job
        return held

    def _queue(self, held: Held, load: Load) -> None:
        # Here: waking a thread that does it would take longer.
        try:
            load.step()
            held.blob, held.queued = load.result(), load.queued
        except BaseException as e:
            held.error = e
        load.close()

    def _count_miss(self, expert: int) -> None:
        self.count(misses=1, bytes_read=self._reader.moved_bytes(self.layer, expert))

    def _ask_for(self, held: Held) -> None:
        """A guess was right, or a fill came too late."""
        if held.guess or held.fill:
            self._count_miss(held.expert)
        if held.guess:
            moved = (
                held.job.load.done
                if held.job
                else self._reader.moved_bytes(self.layer, held.expert)
            )
            self.count(useful_guesses=1, early_bytes=moved)
        held.guess = held.fill = False
        if held.job:
            self._fetcher.promote(held.job)

    def _put_aside(self, held: Held) -> None:
        self.aside.used += 1
        self.outside[held.expert] = held

    def _finished(self, held: Held, blob: Tensor | None, error: BaseException | None) -> None:
        job, held.job = held.job, None
        held.blob, held.error = blob, error
        if job:
            held.queued = job.load.queued
            job.load.close()
        if blob is None:
            if job and (held.guess or held.fill):
                self.count(wasted_bytes=job.load.done)
            self._leave(held)
        elif held.fill:
            held.fill = False
            self._fill_slot(held)
        elif self.is_in_slot(held) and not held.pins:
            # Whoever asked for it was interrupted.
            self._policy.touch(held.expert)
        elif not self.is_in_slot(held) and not held.pins and not held.guess:
            self._leave(held)

    def _fill_slot(self, held: Held) -> None:
        self.count(bytes_read=self._reader.moved_bytes(self.layer, held.expert))
        if self._can_free(()):
            self._move_in(held, ())
            self._policy.touch(held.expert)
        else:
            self._leave(held)

    def _leave(self, held: Held) -> None:
        # By identity: one that an interrupt cut off is nowhere, and another may have come in its
        # place.
        if self.is_in_slot(held):
            del self.held[held.expert]
        elif self.outside.get(held.expert) is held:
            del self.outside[held.expert]
            self.aside.used -= 1
        self._release(held)

    def _release(self, held: Held) -> None:
        if held.buffer is None and self.slots < self._experts:
            self._reader.forget(self.layer, held.expert)
        elif held.buffer is not None and self.aside.pool:
            self.aside.pool.give_back(held.buffer)
        held.buffer = held.blob = None
