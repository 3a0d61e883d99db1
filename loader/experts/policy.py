"""Which expert leaves a full layer of the cache."""

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Protocol


class Order(Protocol):
    """Order of eviction of one layer. Only experts that are in the cache are given up; of others it
    may remember how often they were used.
    """

    def touch(self, expert: int) -> None:
        """`expert` was used, or has just come in and is used.

        Once a use: policies that count would take a second call for a second use. The experts of
        one token come by rank, the first choice first.
        """

    def victim(self, pinned: Collection[int]) -> int:
        """The expert to give up now, none of `pinned`; it is no longer in the cache."""


class Policy(Order, Protocol):
    """The order of a cache whose changes may be interrupted."""

    def settle(self, experts: Collection[int]) -> None:
        """These experts are in the cache, and no others, after a change that was interrupted."""


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

    def settle(self, experts: Collection[int]) -> None:
        _keep_only(self._order, experts)


class LfuPolicy:
    """Least frequently used goes first, of equals the least recently used. Counts outlast evictions
    and never age.
    """

    def __init__(self) -> None:
        self._uses: dict[int, int] = {}
        # In the order of last use, so that min() takes the oldest of equals.
        self._present: OrderedDict[int, None] = OrderedDict()

    def touch(self, expert: int) -> None:
        self._uses[expert] = self._uses.get(expert, 0) + 1
        self._present[expert] = None
        self._present.move_to_end(expert)

    def victim(self, pinned: Collection[int]) -> int:
        expert = min((e for e in self._present if e not in pinned), key=self._uses.__getitem__)
        del self._present[expert]
        return expert

    def settle(self, experts: Collection[int]) -> None:
        for expert in experts:
            self._uses.setdefault(expert, 0)
        _keep_only(self._present, experts)


class LrfuPolicy:
    """LRFU (Lee et al., IEEE Transactions on Computers 50(12), 2001), between LRU and LFU.

    Every use counts for its expert, and counts half as much after each `half_life` uses of the
    layer (by any expert; a token of a top-2 model makes two). A half-life of 1 is LRU, a very long
    one LFU. Values outlast evictions.

    The default half-life is what replay of traces chose (docs/traces.md).
    """

    def __init__(self, half_life: float = 64.0) -> None:
        self._decay = 0.5 ** (1 / half_life)
        self._value: dict[int, float] = {}
        """As of the expert's last use."""
        self._last: dict[int, int] = {}
        self._now = 0
        self._present: OrderedDict[int, None] = OrderedDict()

    def touch(self, expert: int) -> None:
        self._now = now = self._now + 1
        past = self._value.get(expert, 0.0) * math.pow(self._decay, now - self._last.get(expert, 0))
        self._value[expert], self._last[expert] = past + 1.0, now
        self._present[expert] = None
        self._present.move_to_end(expert)

    def victim(self, pinned: Collection[int]) -> int:
        expert = min((e for e in self._present if e not in pinned), key=self._value_now)
        del self._present[expert]
        return expert

    def settle(self, experts: Collection[int]) -> None:
        for expert in experts:
            self._value.setdefault(expert, 0.0)
            self._last.setdefault(expert, self._now)
        _keep_only(self._present, experts)

    def _value_now(self, expert: int) -> float:
        return self._value[expert] * math.pow(self._decay, self._now - self._last[expert])


class FixedPolicy:
    """Keeps the experts that a trace used most: `uses` has the count of each expert of the layer.
    The least used goes first, whatever is asked for now; so with n slots, the top n -
    num_experts_per_tok never leave once they are in.
    """

    def __init__(self, uses: Sequence[int]) -> None:
        self._uses = uses
        self._present: set[int] = set()

    def touch(self, expert: int) -> None:
        self._present.add(expert)

    def victim(self, pinned: Collection[int]) -> int:
        # Of equals the highest number, so that the choice does not depend on a set's order.
        expert = min(
            (e for e in self._present if e not in pinned), key=lambda e: (self._uses[e], -e)
        )
        self._present.remove(expert)
        return expert

    def settle(self, experts: Collection[int]) -> None:
        self._present = set(experts)


def _keep_only(order: OrderedDict[int, None], experts: Collection[int]) -> None:
    for expert in [expert for expert in order if expert not in experts]:
        del order[expert]
    for expert in experts:
        order.setdefault(expert, None)


POLICIES: dict[str, Callable[[], Policy]] = {"lru": LruPolicy, "lfu": LfuPolicy, "lrfu": LrfuPolicy}
"""What makes the policy of a layer, by name. `fixed_policies` makes those that need a trace."""


def fixed_policies(uses: Sequence[Sequence[int]]) -> list[Callable[[], Policy]]:
    """What makes a `FixedPolicy`, for each layer: `uses[layer][expert]` from a trace
    (`Trace.uses`).
    """
    return [partial(FixedPolicy, layer) for layer in uses]
