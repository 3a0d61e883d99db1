"""moe_linear_many, which the native attention calls, as a function for tests."""

import torch

from loader.arithmetic.kernels import PackedMatrix
from loader.arithmetic.native_library import Matrix, library, packing_id


def products_of(x: torch.Tensor, matrices: list[PackedMatrix]) -> list[torch.Tensor]:
    """Several matrices over one quantized x [T, columns] float32: float32 [T, rows] each."""
    tokens, columns = x.shape
    results = []
    entries = (Matrix * len(matrices))()
    for entry, (tiles, packing, rows) in zip(entries, matrices, strict=True):
        y = torch.empty((tokens, rows))
        entry.packing = packing_id(packing)
        entry.tiles = tiles.data_ptr()
        entry.rows = rows
        entry.y = y.data_ptr()
        results.append(y)
    code = library().moe_linear_many(entries, len(matrices), columns, x.data_ptr(), tokens)
    assert code == 0
    return results
