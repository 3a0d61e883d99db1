"""A prompt's (token, expert) pairs in the order in which kernels take them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from loader.cuda.products.structures import MOST_EXPERTS

MOST_PAIRS = 1024
"""Of one pass over experts: their h and outputs take 35 MB at 8x7B's sizes."""


class Pairs:
    """The (token, rank) pairs of a call by expert, ascending, tokens ascending; int32 arrays on the
    device.

    token [pairs]: of each pair. place [T, k], rank [T, k]: each token's pairs in ascending order of
    experts, as positions in that list, and as ranks.
    """

    def __init__(self, index: Tensor, device: torch.device) -> None:
        tokens, top_k = index.shape
        rank = index.argsort(dim=1, stable=True)
        expert, order = index.gather(1, rank).flatten().sort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(tokens * top_k)
        arrays = torch.stack([order // top_k, place, rank.flatten()]).to(torch.int32)
        self.token, self.place, self.rank = arrays.to(device, non_blocking=True)
        numbers, counts = expert.unique_consecutive(return_counts=True)
        ends = counts.cumsum(0)
        self._ranges = dict(
            zip(
                numbers.tolist(),
                zip((ends - counts).tolist(), ends.tolist(), strict=True),
                strict=True,
            )
        )

    def parts(self, expert: int) -> list[tuple[int, int]]:
        """The expert's ranges of pairs, at most MOST_PAIRS each."""
        begin, end = self._ranges.get(expert, (0, 0))
        return [(at, min(end, at + MOST_PAIRS)) for at in range(begin, end, MOST_PAIRS)]


def passes(work: Sequence[tuple[Tensor, int, int]]) -> list[tuple[int, int]]:
    """Ranges of `work` (blob, range of pairs) that one pass takes: neighbours, few enough experts
    and pairs.
    """
    ranges, begin = [], 0
    for at in range(1, len(work) + 1):
        if (
            at == len(work)
            or at - begin == MOST_EXPERTS
            or work[at][1] != work[at - 1][2]
            or work[at][2] - work[begin][1] > MOST_PAIRS
        ):
            ranges.append((begin, at))
            begin = at
    return ranges
