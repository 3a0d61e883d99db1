"""Repairs caches in a forked child, which has the parent's memory but none of its threads."""

import functools
import logging
import os
import weakref
from typing import Any, Protocol

import torch

from formats.errors import MoeConvertError

_log = logging.getLogger(__name__)


class SurvivesFork(Protocol):
    """An object that holds locks, threads or reads in progress."""

    def start_anew(self) -> None:
        """Prepare for use in a forked child. Called first there, by its only thread."""


_registered: "weakref.WeakSet[Any]" = weakref.WeakSet()


def keep_over_forks(survivor: SurvivesFork) -> None:
    """Call `survivor.start_anew` in each forked child."""
    _register()
    _registered.add(survivor)


@functools.lru_cache(maxsize=1)
def _register() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_in_child)


def _in_child() -> None:
    survivors = list(_registered)
    for survivor in survivors:
        survivor.start_anew()
    if survivors and torch.get_num_threads() > 1:
        # GNU OpenMP waits forever for the parent's threads if they have computed anything.
        torch.set_num_threads(1)
        _log.info(
            "process %d was forked from one with a model: torch has one thread here", os.getpid()
        )


def no_gpu_after_fork() -> MoeConvertError:
    """Return the error for a model that is used on a GPU in a forked child."""
    return MoeConvertError(
        "the model is on a GPU, which a forked process cannot use",
        "load the model in each process, or start processes by multiprocessing's spawn method",
    )
