"""Eviction policies: which expert leaves a full layer of the cache."""

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Protocol


class Order(Protocol):
    """Eviction order of one layer.

    Only experts with a slot can be victims. Use counts of other experts may be remembered.
    """

    def touch(self, expert: int) -> None:
        """Note one use of `expert`, which has a slot or has just got one.

        Called exactly once for each use, because policies count. The experts of one token come by
        rank, the first choice first.
        """

    def victim(self, pinned: Collection[int]) -> int:
        """Remove and return the expert to evict now, which is none of `pinned`."""


class Policy(Order, Protocol):
    """An eviction order that can be repaired after an interrupted change."""

    def settle(self, experts: Collection[int]) -> None:
        """Make the order consistent: exactly these experts have slots."""


class LruPolicy:
    """Evicts the least recently used expert."""

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
    """Evicts the least frequently used expert; among equals the least recently used one.

    Counts survive evictions and never age.
    """

    def __init__(self) -> None:
        self._uses: dict[int, int] = {}
        # In the order of last use, so that min() returns the oldest of equals.
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
    """LRFU, between LRU and LFU (Lee et al., IEEE Transactions on Computers 50(12), 2001).

    Each use adds 1 to its expert's value. Values halve after every `half_life` uses of the layer,
    by any expert; a token of a top-2 model makes two uses. The expert with the lowest value is
    evicted. A half-life of 1 is LRU, a very long one is LFU. Values survive evictions.

    The default half-life was chosen by replay of traces (docs/traces.md).
    """

    def __init__(self, half_life: float = 64.0) -> None:
        self._decay = 0.5 ** (1 / half_life)
        self._value: dict[int, float] = {}
        """Value of each expert at its last use."""
        self._last: dict[int, int] = {}
        self._now = 0
        self._present: OrderedDict[int, None] = OrderedDict()

    def touch(self, expert: int) -> None:
        now = self._now + 1
        self._now = now
        past = self._value.get(expert, 0.0) * math.pow(self._decay, now - self._last.get(expert, 0))
        self._value[expert] = past + 1.0
        self._last[expert] = now
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
    """Keeps the experts that a trace used most, whatever is requested now.

    uses: how often the trace used each expert of the layer. The least used expert is evicted. So
    with n slots, the n - num_experts_per_tok most used experts never leave once they are in.
    """

    def __init__(self, uses: Sequence[int]) -> None:
        self._uses = uses
        self._present: set[int] = set()

    def touch(self, expert: int) -> None:
        self._present.add(expert)

    def victim(self, pinned: Collection[int]) -> int:
        # Among equals the highest number: the choice must not depend on the order of a set.
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
"""Name -> what makes the policy of a layer. `FixedPolicy` needs a trace: `fixed_policies`."""


def fixed_policies(uses: Sequence[Sequence[int]]) -> list[Callable[[], Policy]]:
    """Return what makes the `FixedPolicy` of each layer.

    uses: `uses[layer][expert]` is how often a trace used the expert (`Trace.uses`).
    """
    return [partial(FixedPolicy, layer) for layer in uses]
