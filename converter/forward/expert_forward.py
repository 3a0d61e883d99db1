"""The output of one expert, from slices of its matrices that are read on use."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from converter.checkpoint.names import EXPERT_MATRICES, ExpertTensor
from converter.checkpoint.source import Checkpoint
from converter.checkpoint.weight import Weight

ROWS_AT_ONCE = 1024
"""Rows of an expert's matrix in one slice."""

DownVisitor = Callable[[int, Tensor], None]
"""Receives (begin, rows of down from `begin` on, in the stored dtype)."""


class SliceVisitor:
    """Receives the slices of an expert's matrices as they are used. This one ignores them."""

    rows_at_once: int | None = None
    """Rows of gate and up in a slice; None for ROWS_AT_ONCE."""

    def gate_up(self, begin: int, gate: Tensor, up: Tensor, inner: Tensor) -> None:
        """Receive rows of gate and up from row `begin` on, in the stored dtype.

        inner: their result, which is these columns of down's inputs, float32 [n, rows].
        """

    def start_down(self, inner: Tensor) -> DownVisitor:
        """Receive all of down's inputs, [n, intermediate]; return the visitor of down's slices."""
        return _ignore


def _ignore(_begin: int, _rows: Tensor) -> None:
    pass


class ExpertForward:
    """Computes the experts of `checkpoint` with products in one dtype. Thread-safe."""

    def __init__(self, checkpoint: Checkpoint, products: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._products = products

    def output(
        self, layer: int, expert: int, x: Tensor, visitor: SliceVisitor | None = None
    ) -> Tensor:
        """Return the expert's output before weighting, float32 [n, hidden].

        x: its inputs, float32 [n, hidden]. layer: ordinal among the layers with experts. Memory
        holds one slice of gate and one of up, or one of down.
        """
        visitor = visitor or SliceVisitor()
        gate, up, down = (
            self._checkpoint.experts[ExpertTensor(layer, expert, p)] for p in EXPERT_MATRICES
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
        matrices: tuple[Weight, Weight],
        begin: int,
        end: int,
        x: Tensor,
        inner: Tensor,
        visitor: SliceVisitor,
    ) -> None:
        gate, up = matrices
        gate_rows = read_finite(self._checkpoint, gate, begin, end)
        up_rows = read_finite(self._checkpoint, up, begin, end)
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
    """Return silu(x · gateᵀ) * (x · upᵀ), these columns of down's inputs, float32 [n, rows].

    x: an expert's inputs [n, hidden], in the dtype of the rows [rows, hidden].
    """
    return functional.silu((x @ gate_rows.T).float()).mul_(x @ up_rows.T)


def ranges(rows: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of slices of `step` rows; the last may be shorter."""
    for begin in range(0, rows, step):
        yield begin, min(begin + step, rows)


def read_finite(checkpoint: Checkpoint, weight: Weight, begin: int, end: int) -> Tensor:
    """Return rows begin..end (exclusive) of `weight` in the stored dtype.

    SourceError with the position of a value that is infinite or NaN.
    """
    rows = checkpoint.read_rows(weight, begin, end)
    checkpoint.check_finite(weight, begin, rows)
    return rows


def fast_products(checkpoint: Checkpoint) -> torch.dtype:
    """Return bfloat16 if the experts are stored in it and the CPU multiplies it, else float32.

    It is twice as fast there.
    """
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.bfloat16 if checkpoint.expert_dtypes == {"BF16"} and supported() else torch.float32
