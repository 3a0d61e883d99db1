"""Parts that the solvers in torch share: finite weights, row scales in fp16, error sums."""

import torch
from torch import Tensor

from converter.solver_errors import NonFiniteWeightsError, UnfitWeightsError
from converter.squared_error import SquaredError
from formats.packing import Packing
from formats.tiles import QuantizedMatrix, dequantize

FP16_MAX = 65504.0
_FP16_TINY = 2.0**-24


def check_finite(weight: Tensor) -> None:
    """Raise NonFiniteWeightsError if a weight is infinite or NaN."""
    if count := int((~torch.isfinite(weight)).sum()):
        raise NonFiniteWeightsError(count)


def fp16_row_scales(largest: Tensor, max_integer: int) -> Tensor:
    """Return the row scales, fp16 [rows], under which each row's largest value is `max_integer`.

    largest: float32 [rows], 0 or more. A positive scale stays positive in fp16. Raises
    UnfitWeightsError for a scale that exceeds fp16.
    """
    scale = largest / max_integer
    if float(scale.max()) > FP16_MAX:
        raise UnfitWeightsError(
            f"a weight scale of {float(scale.max()):.3g} does not fit into fp16"
        )
    return torch.where(scale > 0, scale.clamp(min=_FP16_TINY), scale).half()


def quantization_error(weight: Tensor, matrix: QuantizedMatrix, packing: Packing) -> SquaredError:
    """Return the error of a quantized matrix against its float32 weights [rows, columns]."""
    deviation = (dequantize(matrix, packing.group_size) - weight).double()
    squares = weight.double()
    return SquaredError(float(deviation.square_().sum()), float(squares.square_().sum()))
