"""One expert's output, from slices of its matrices that are read when they are used."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from converter.checkpoint.names import ExpertTensor
from converter.checkpoint.source import Checkpoint
from converter.checkpoint.weight import Weight

ROWS_AT_ONCE = 1024
"""Of an expert's matrix."""


class SliceVisitor:
    """Sees the slices of an expert's matrices as they are used. This one ignores them."""

    rows_at_once: int | None = None
    """Rows of gate and up in a slice; None for ROWS_AT_ONCE."""

    def gate_up(self, begin: int, gate: Tensor, up: Tensor, inner: Tensor) -> None:
        """Takes rows of gate and up from row `begin` on, as stored, and what they give: these
        columns of down's inputs, float32 [n, rows].
        """

    def start_down(self, inner: Tensor) -> "DownVisitor":
        """Takes all of down's inputs, [n, intermediate]; returns what takes down's slices."""
        return _ignore


DownVisitor = Callable[[int, Tensor], None]
"""Takes rows of down, as stored, from a first row on."""


def _ignore(_begin: int, _rows: Tensor) -> None:
    pass


class ExpertForward:
    """Computes the experts of `checkpoint`, multiplying in the dtype `products`. Safe to use from
    several threads.
    """

    def __init__(self, checkpoint: Checkpoint, products: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._products = products

    def output(
        self, layer: int, expert: int, x: Tensor, visitor: SliceVisitor | None = None
    ) -> Tensor:
        """Return the expert's output, float32 [n, hidden], for its inputs x (float32 [n, hidden]),
        not yet weighted.

        A slice of gate and one of up, or one of down, is in memory. layer: ordinal among the layers
        with experts.
        """
        visitor = visitor or SliceVisitor()
        gate, up, down = (
            self._checkpoint.experts[ExpertTensor(layer, expert, p)] for p in ("gate", "up", "down")
        )
        x = x.to(self._products)
        inner = torch.empty(len(x), gate.shape[0], dtype=self._products)
        for begin, end in ranges(gate.shape[0], visitor.rows_at_once or ROWS_AT_ONCE):
            self._gate_up((gate, up), begin, end, x, inner, visitor)
        visit_down = visitor.start_down(inner)
        result = torch.empty(len(x), down.shape[0])
        for begin, end in ranges(down.shape[0], ROWS_AT_ONCE):
            self._down(down, begin, end, inner, result, visit_down)
        return result

    def _gate_up(
        self,
        both: tuple[Weight, Weight],
        begin: int,
        end: int,
        x: Tensor,
        inner: Tensor,
        visitor: SliceVisitor,
    ) -> None:
        gate_rows, up_rows = (read_finite(self._checkpoint, weight, begin, end) for weight in both)
        part = inner_activations(x, gate_rows.to(self._products), up_rows.to(self._products))
        inner[:, begin:end] = part
        visitor.gate_up(begin, gate_rows, up_rows, part)

    def _down(
        self, down: Weight, begin: int, end: int, inner: Tensor, result: Tensor, visit: DownVisitor
    ) -> None:
        rows = read_finite(self._checkpoint, down, begin, end)
        result[:, begin:end] = inner @ rows.to(self._products).T
        visit(begin, rows)


def inner_activations(x: Tensor, gate_rows: Tensor, up_rows: Tensor) -> Tensor:
    """Return some of down's inputs, float32 [n, rows], for an expert's inputs x [n, hidden] and
    rows of gate and up.

    All three have one dtype.
    """
    return functional.silu((x @ gate_rows.T).float()).mul_(x @ up_rows.T)


def ranges(rows: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of slices of `step` rows, the last perhaps shorter."""
    for begin in range(0, rows, step):
        yield begin, min(begin + step, rows)


def read_finite(checkpoint: Checkpoint, weight: Weight, begin: int, end: int) -> Tensor:
    """Return rows begin..end (exclusive) of `weight` as stored; SourceError naming the place of a
    value that is not finite.
    """
    rows = checkpoint.read_rows(weight, begin, end)
    checkpoint.check_finite(weight, begin, rows)
    return rows


def fast_products(checkpoint: Checkpoint) -> torch.dtype:
    """Return bfloat16 where the experts are stored so and the processor multiplies it (twice as
    fast); else float32.
    """
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.bfloat16 if checkpoint.expert_dtypes == {"BF16"} and supported() else torch.float32
