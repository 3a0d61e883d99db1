"""Torch's threads while a few tokens go through the model: one.

Torch's OpenMP team spins on the cores that our pool needs; with another job on the machine each of a layer's small
operations then waits for a time slice (10 ms each, measured on two cores). A few tokens give torch nothing that a
second thread could speed up: the work is in our own calls.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from loader.cache_length import cache_in, length_of, shorten
from loader.forks import keep_over_forks

FEW_TOKENS = 8

Shortcut = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]


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
    """Inside, torch runs on one thread if there are at most FEW_TOKENS `tokens`; else nothing changes.

    torch's number is back afterwards, whatever was raised; inside another such block nothing changes. The number
    belongs partly to the thread (OpenMP) and partly to the process (MKL, and what new threads begin with). A thread
    that begins to use torch while another is inside would keep the one thread; its own first block mends that.
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


def run_few_tokens_on_one_thread(
    model: nn.Module, first: Shortcut | None = None, after_failure: Callable[[], None] | None = None
) -> None:
    """Puts `torch_threads_for` around the model's forward: by a method of the instance, since its class is
    transformers' own, and since torch's hooks do not run after a KeyboardInterrupt.

    `first`(model, args, kwargs) is asked before, outside of it; what it gives, unless None, is the result. A pass that
    does not come to its end leaves the KV cache as long as it was, and calls `after_failure`.
    """

    keep_over_forks(_passes)

    @functools.wraps(type(model).forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        past = cache_in(args, kwargs)
        length = length_of(past)
        try:
            if first is not None and (result := first(self, args, kwargs)) is not None:
                return result
            with torch_threads_for(_tokens(args, kwargs)):
                return type(self).forward(self, *args, **kwargs)
        except BaseException:
            shorten(past, length)
            if after_failure is not None:
                after_failure()
            raise

    model.forward = MethodType(forward, model)


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Tokens of a call of the model; without any to be seen, many."""
    ids = args[0] if args else kwargs.get("input_ids")
    if isinstance(ids, Tensor):
        return ids.numel()
    embeddings = kwargs.get("inputs_embeds")
    return embeddings.shape[:-1].numel() if isinstance(embeddings, Tensor) else FEW_TOKENS + 1
