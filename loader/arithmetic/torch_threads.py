"""Limits torch to one thread while a few tokens go through the model.

Torch's OpenMP threads spin on cores that the native pool needs. If another process runs too, each
small operation of a layer then waits for a time slice (10 ms, measured on two cores). With few
tokens a second thread gains nothing: the work is in the native calls.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from loader.lifetime.forks import keep_over_forks

FEW_TOKENS = 8
"""Tokens up to which torch is limited to one thread."""


class _State(threading.local):
    depth = 0


class _Passes:
    """outside: torch's thread count before the block, by ident of each thread inside a block."""

    def __init__(self) -> None:
        self.start_anew()

    def start_anew(self) -> None:
        """Forget all threads, at the start and in a forked child."""
        self.lock = threading.Lock()
        self.outside: dict[int, int] = {}


_state = _State()
_passes = _Passes()


@contextmanager
def torch_threads_for(tokens: int) -> Iterator[None]:
    """Limit torch to one thread inside the block if there are at most FEW_TOKENS `tokens`.

    Afterwards torch's thread count is restored, also after an error. A nested block changes
    nothing.

    The count belongs partly to the thread (OpenMP) and partly to the process (MKL, default of new
    threads). A thread that first uses torch while another one is inside a block inherits the one
    thread; its own first block corrects that.
    """
    if _state.depth:
        yield
        return
    thread, outside = threading.get_ident(), _passes.outside
    try:
        with _passes.lock:
            now = torch.get_num_threads()
            # A count noted for this thread was left by an interrupt.
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
    """Make forked children begin without any thread inside a block."""
    keep_over_forks(_passes)
