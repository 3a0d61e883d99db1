"""Tasks whose results are taken in their order, whoever runs them."""

from collections.abc import Callable, Iterable
from typing import Any

RunAll = Callable[[Iterable[Callable[[], Any]]], list[Any]]
"""Runs tasks, possibly side by side, and returns their results in the tasks' order."""


def one_by_one(tasks: Iterable[Callable[[], Any]]) -> list[Any]:
    """Run tasks in this thread, one after the other."""
    return [task() for task in tasks]
