"""Which expert leaves a full layer of the cache."""

from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Protocol


class Policy(Protocol):
    """Order of eviction of one layer. It knows only the experts that are in the cache."""

    def touch(self, expert: int) -> None:
        """`expert` was used, or has just come in."""

    def victim(self, pinned: Collection[int]) -> int:
        """The expert to give up now, none of `pinned`; it is forgotten."""


class LruPolicy:
    """Least recently used goes first."""

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()

    def touch(self, expert: int) -> None:
        self._order[expert] = None
        self._order.move_to_end(expert)

    def victim(self, pinned: Collection[int]) -> int:
        expert = next(e for e in self._order if e not in pinned)
        del self._order[expert]
        return expert


POLICIES: dict[str, Callable[[], Policy]] = {"lru": LruPolicy}
