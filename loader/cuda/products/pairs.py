"""A prompt's (token, expert) pairs, in the order in which kernels compute them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loader.cuda.products.structures import MAX_EXPERTS

MAX_PAIRS = 1024
"""Pairs of one pass: their h and outputs take 35 MB at 8x7B's sizes."""


@dataclass(frozen=True)
class ExpertPairs:
    """An expert's bytes, uint8 [n_bytes], and the range [begin, end) of its pairs."""

    blob: Tensor
    begin: int
    end: int


class Pairs:
    """The (token, rank) pairs of a call, sorted by expert, then by token.

    All arrays are int32, on the device. token [pairs]: token of each pair. place, rank [T, k]:
    position among the pairs, and rank, of each token's pairs, sorted by expert.
    """

    def __init__(self, index: Tensor, device: torch.device) -> None:
        """index: the experts that the router chose, int64 [T, k] on the CPU."""
        tokens, top_k = index.shape
        rank = index.argsort(dim=1, stable=True)
        expert, order = index.gather(1, rank).flatten().sort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(tokens * top_k)
        arrays = torch.stack([order // top_k, place, rank.flatten()]).to(torch.int32)
        self.token, self.place, self.rank = arrays.to(device, non_blocking=True)
        experts, counts = expert.unique_consecutive(return_counts=True)
        ends = counts.cumsum(0)
        ranges = zip((ends - counts).tolist(), ends.tolist(), strict=True)
        self._ranges = dict(zip(experts.tolist(), ranges, strict=True))
        """[begin, end) of the pairs, by expert."""

    def parts(self, expert: int) -> list[tuple[int, int]]:
        """Return the expert's pairs as ranges [begin, end) of at most MAX_PAIRS."""
        begin, end = self._ranges.get(expert, (0, 0))
        return [(at, min(end, at + MAX_PAIRS)) for at in range(begin, end, MAX_PAIRS)]


def passes(work: Sequence[ExpertPairs]) -> list[Sequence[ExpertPairs]]:
    """Split `work` into passes.

    A pass has at most MAX_EXPERTS entries and MAX_PAIRS pairs, and its pairs are consecutive.
    """
    result = []
    begin = 0
    for at in range(1, len(work) + 1):
        if (
            at == len(work)
            or at - begin == MAX_EXPERTS
            or work[at].begin != work[at - 1].end
            or work[at].end - work[begin].begin > MAX_PAIRS
        ):
            result.append(work[begin:at])
            begin = at
    return result
