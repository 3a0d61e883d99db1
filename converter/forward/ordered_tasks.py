"""Tasks whose results come in the order of the tasks, whoever runs them."""

from collections.abc import Callable, Iterable
from typing import Any

RunAll = Callable[[Iterable[Callable[[], Any]]], list[Any]]
"""Runs tasks, possibly in parallel, and returns their results in the order of the tasks."""


def one_by_one(tasks: Iterable[Callable[[], Any]]) -> list[Any]:
    """Run tasks in this thread, one after the other."""
    return [task() for task in tasks]
