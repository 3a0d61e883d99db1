"""Many tokens' experts of a layer, each once, the next ones being read while the caller computes."""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from threading import Condition

from torch import Tensor

from loader.lease import arrived, blob_of
from loader.slots import Held, LayerSlots


def stream(
    slots: LayerSlots,
    experts: Sequence[int],
    lock: Condition,
    make_room: Callable[[], None],
    look_ahead: Callable[[], None],
    waited: Callable[[float], None],
    *,
    ascending: bool,
) -> Iterator[dict[int, Tensor]]:
    """The different `experts`, in the order of their last use, in parts: number -> uint8 [n_bytes].

    A part is valid until the next one is asked for, and then for what the caller's stream had been given. Parts come as
    experts arrive, or with `ascending` in ascending order over all; where copies are queued, one by one, so that the
    next ones go on while one is used. Each expert is read at most once. Afterwards the slots hold the last used, as if
    the tokens had come one by one (with `ascending` as far as no expert has to leave before its turn).

    `make_room` is called where nothing moves, with the lock held; `look_ahead` before the last part, when the disk has
    no more to do for this layer. Errors as `formats.reader.Load`.
    """
    keep = frozenset(experts[max(0, len(experts) - slots.slots) :])
    todo, held = sorted(experts), dict[int, Held]()
    kept: list[Held] = []
    try:
        with lock:
            for expert in experts:
                if expert in slots.held:
                    held[expert] = _pin(slots.held[expert])
            slots.hits += len(held)
        while todo:
            begin_s = time.perf_counter()
            with lock:
                _begin_reads(slots, todo, held, keep, ascending)
                while not (part := _part(todo, held, ascending)):
                    if not any(entry.job for entry in held.values()):
                        make_room()
                        _begin_reads(slots, todo, held, keep, ascending)
                        # What is only queued is there at once, and nobody will tell.
                        if part := _part(todo, held, ascending):
                            break
                    lock.wait()
                    _begin_reads(slots, todo, held, keep, ascending)
                waited(time.perf_counter() - begin_s)
            blobs = {expert: blob_of(held[expert]) for expert in part}
            todo = [expert for expert in todo if expert not in part]
            if not todo:
                look_ahead()
            slots.before_use(blobs.values())
            yield blobs
            with lock:
                slots.after_use(held[expert] for expert in part)
                # What leaves first: it makes room for what stays.
                for expert in sorted(part, key=keep.__contains__):
                    entry = held.pop(expert)
                    if expert in keep:
                        slots.keep(entry, keep)
                    if expert in keep and entry.in_slot:
                        kept.append(entry)
                    else:
                        slots.end(entry)
                lock.notify_all()
    finally:
        with lock:
            slots.after_use(held.values())
            for entry in held.values():
                slots.end(entry)
            for entry in sorted(kept, key=lambda entry: experts.index(entry.expert)):
                slots.end(entry)
            slots.drop_guesses()
            lock.notify_all()


def _pin(entry: Held) -> Held:
    entry.pins += 1
    return entry


def _begin_reads(
    slots: LayerSlots, todo: list[int], held: dict[int, Held], keep: frozenset[int], ascending: bool
) -> None:
    # Guesses first, which take room already; but in a fixed order what comes later must not take the room of the next.
    order = todo if ascending else sorted(todo, key=lambda expert: expert not in slots.outside)
    for expert in order:
        if expert not in held:
            entry = slots.take(expert, keep)
            if entry is None:
                return
            held[expert] = _pin(entry)


def _part(todo: list[int], held: dict[int, Held], ascending: bool) -> list[int]:
    """What can be computed now: experts that are there or failed."""
    entries = [held[expert] for expert in todo if expert in held]
    if ascending:
        there = takewhile(lambda expert: expert in held and not held[expert].job, todo)
        entries = [held[expert] for expert in there]
        entries = list(takewhile(lambda entry: not entry.queued, entries)) or entries[:1]
    return [entry.expert for entry in arrived(entries)]
