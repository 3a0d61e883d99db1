"""Torch's threads while a few tokens go through the model: one.

Torch's OpenMP team spins on the cores that our pool needs; with another job on the machine each of
a layer's small operations then waits for a time slice (10 ms each, measured on two cores). A few
tokens give torch nothing that a second thread could speed up: the work is in our own calls.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from loader.lifetime.forks import keep_over_forks

FEW_TOKENS = 8


class _State(threading.local):
    depth = 0


class _Passes:
    """outside: torch's number as each thread that is inside now found it, by the thread's number."""

    def __init__(self) -> None:
        self.start_anew()

    def start_anew(self) -> None:
        """For a forked child as well."""
        self.lock = threading.Lock()
        self.outside: dict[int, int] = {}


_state = _State()
_passes = _Passes()


@contextmanager
def torch_threads_for(tokens: int) -> Iterator[None]:
    """Inside, torch runs on one thread if there are at most FEW_TOKENS `tokens`; else nothing
    changes.

    torch's number is back afterwards, whatever was raised; inside another such block nothing
    changes. The number belongs partly to the thread (OpenMP) and partly to the process (MKL, and
    what new threads begin with). A thread that begins to use torch while another is inside would
    keep the one thread; its own first block mends that.
    """
    if _state.depth:
        yield
        return
    thread, outside = threading.get_ident(), _passes.outside
    try:
        with _passes.lock:
            now = torch.get_num_threads()
            # One that is noted for this thread was left there by an interrupt.
            before = outside.pop(thread, now)
            if before == 1 and outside:
                before = next(iter(outside.values()))
            wanted = before
            if tokens <= FEW_TOKENS:
                outside[thread], wanted = before, 1
                _state.depth = 1
            if wanted != now:
                torch.set_num_threads(wanted)
        yield
    finally:
        _state.depth = 0
        with _passes.lock:
            if thread in outside:
                torch.set_num_threads(outside[thread])
                del outside[thread]


def keep_threads_over_forks() -> None:
    """Have forked children begin with no thread inside."""
    keep_over_forks(_passes)
