"""Repacked tiles have the weights of the reference, for all codes and scales."""

import gguf
import numpy as np
import pytest
import torch

from converter.gguf.block_types import Type
from converter.gguf.encode import encoded_chunks, encoded_floats
from formats.errors import FormatError
from formats.packing import PACKINGS, Packing
from formats.tiles import QuantizedMatrix, dequantize, pack

ROWS, COLUMNS = 70, 768


def random_matrix(packing: Packing) -> QuantizedMatrix:
    generator = torch.Generator().manual_seed(0)

    def integers(low: int, high: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(low, high + 1, (ROWS, columns), generator=generator, dtype=dtype)

    groups = COLUMNS // packing.group_size
    return QuantizedMatrix(
        integers(0, packing.max_code, COLUMNS, torch.uint8),
        integers(0, packing.max_s, groups, torch.int16),
        integers(packing.min_m, packing.max_m, groups, torch.int16),
        torch.randn(ROWS, generator=generator).half(),
        torch.randn(ROWS, generator=generator).half(),
    )


def exported(packing: Packing, matrix: QuantizedMatrix, kind: Type) -> np.ndarray:
    tiles = pack(matrix, packing)
    rows = torch.cat(list(encoded_chunks(packing, tiles, ROWS, COLUMNS, kind, "w")))
    return gguf.dequantize(rows.numpy(), kind)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tile32-q2-g16-s4", Type.Q2_K),
        ("tile32-q3-g32-s4", Type.Q4_K),
        *((name, Type.F32) for name in PACKINGS),
    ],
)
def test_exact_types_have_the_weights_of_the_tiles(name: str, kind: Type) -> None:
    packing = PACKINGS[name]
    matrix = random_matrix(packing)
    expected = dequantize(matrix, packing.group_size).numpy()
    assert np.array_equal(exported(packing, matrix, kind), expected)


@pytest.mark.parametrize("name", ["tile32-q3-g64-s8", "tile32-q4-g64-s8", "tile32-q3-g32-s4"])
def test_q4_1_keeps_codes_and_rounds_only_scales(name: str) -> None:
    packing = PACKINGS[name]
    matrix = random_matrix(packing)
    scale = (matrix.ds.float()[:, None] * matrix.s).half().float()
    minimum = (matrix.dm.float()[:, None] * matrix.m).half().float()
    codes = matrix.codes.view(ROWS, -1, packing.group_size)
    expected = (codes * scale[..., None] - minimum[..., None]).flatten(1)
    assert np.array_equal(exported(packing, matrix, Type.Q4_1), expected.numpy())


# Errors of ggml's own quantization, relative to the weights of a normal distribution.
@pytest.mark.parametrize(
    ("kind", "largest"),
    [
        (Type.BF16, 0.0018),
        (Type.F16, 0.0003),
        (Type.Q8_0, 0.006),
        (Type.Q4_1, 0.075),
        (Type.Q4_K, 0.075),
        (Type.Q3_K, 0.16),
    ],
)
def test_requantized_weights_are_near(kind: Type, largest: float) -> None:
    weights = torch.randn(40, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    read = gguf.dequantize(encoded_floats(weights, kind, "w").numpy(), kind)
    error = np.sqrt(((read - weights.numpy()) ** 2).mean()) / weights.std().item()
    assert error < largest


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_1, Type.Q4_K, Type.Q3_K])
@pytest.mark.parametrize("value", [0.0, 0.5, -0.5])
def test_equal_weights_stay_nearly_equal(kind: Type, value: float) -> None:
    weights = torch.full((2, 256), value)
    read = gguf.dequantize(encoded_floats(weights, kind, "w").numpy(), kind)
    assert np.abs(read - value).max() <= 0.01 * abs(value)


def test_weight_beyond_float16_is_refused_by_name() -> None:
    weights = torch.tensor([[1.0, -70000.0]], dtype=torch.bfloat16)
    with pytest.raises(FormatError, match=r"w: a weight of size 70144 .* float16"):
        encoded_floats(weights, Type.F16, "w")
