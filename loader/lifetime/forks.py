"""What a forked child makes of the caches that it finds: it has the memory, and none of the
threads.
"""

import functools
import logging
import os
import weakref
from typing import Any, Protocol

import torch

from formats.errors import MoeConvertError

_log = logging.getLogger(__name__)


class Kept(Protocol):
    """Something that locks, threads or reads of this process stand in."""

    def start_anew(self) -> None:
        """Called in a forked child, by its only thread, before anything else."""


_kept: "weakref.WeakSet[Any]" = weakref.WeakSet()


def keep_over_forks(kept: Kept) -> None:
    """Has it start anew in each forked child."""
    _register()
    _kept.add(kept)


@functools.lru_cache(maxsize=1)
def _register() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_in_child)


def _in_child() -> None:
    found = list(_kept)
    for kept in found:
        kept.start_anew()
    if found and torch.get_num_threads() > 1:
        # GNU OpenMP waits for ever for the parent's threads once these have computed something.
        torch.set_num_threads(1)
        _log.info(
            "process %d was forked from one with a model: torch has one thread here", os.getpid()
        )


def no_gpu_after_fork() -> MoeConvertError:
    """What use of a GPU in a forked child raises."""
    return MoeConvertError(
        "the model is on a GPU, which a forked process cannot use",
        "load the model in each process, or start processes by multiprocessing's spawn method",
    )
