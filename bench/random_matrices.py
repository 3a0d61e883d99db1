"""Random matrices in packed form, for benchmarks: drawing one costs a copy, no solver runs.

A matrix is drawn from a pool of packed tiles, or of plain rows. So two matrices differ in the
order of their tiles, and a large one repeats some. The weights have mean 0 and the standard
deviation 1/√columns: products have the size of their inputs, through any number of layers.
"""

import hashlib

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from formats.expert import ExpertLayout, sections
from formats.packing import TILE_ROWS, AnyPacking, Packing
from formats.tiles import QuantizedMatrix, pack

POOL_WEIGHTS = 16 << 20
"""Most weights that a pool packs, in about a second."""
POOL_ROWS = 4096
_MIN_S_SHARE = 16
"""S begins at 1/16 of its range: a group with S = 0 would have no weights."""


def generator_for(seed: int, key: str) -> Generator:
    """Return the generator of the part `key` of a model made with `seed`."""
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


class MatrixPool:
    """Stored rows of random [rows, columns] matrices in one packing.

    A stored row is a tile of 32 rows, or one plain row.
    """

    def __init__(self, packing: AnyPacking, rows: int, columns: int, generator: Generator) -> None:
        count = min(POOL_ROWS, max(TILE_ROWS, POOL_WEIGHTS // columns))
        tail_rows = rows % packing.rows_each
        self._rows = _stored(packing, count - count % TILE_ROWS, columns, generator)
        self._tail = _stored(packing, tail_rows, columns, generator) if tail_rows else None
        """The last tile, whose padding rows are zero."""

    def fill(self, stored: Tensor, generator: Generator, matrices: int = 1) -> None:
        """Fill `stored` (the packing's dtype, contiguous [stored rows, width]).

        matrices: number of matrices in `stored`, which alternate tile by tile.
        """
        end = len(stored)
        if self._tail is not None:
            end -= matrices
            stored[end:] = self._tail
        chosen = generator.integers(len(self._rows), size=end)
        # Not torch's index_select: its threads spin while other layers are written.
        out = stored[:end].view(torch.uint8).numpy()
        np.take(self._rows.view(torch.uint8).numpy(), chosen, axis=0, out=out, mode="clip")


class ExpertPool:
    """Source of random experts of one layout."""

    def __init__(self, layout: ExpertLayout, generator: Generator) -> None:
        self.layout = layout
        self._gate_up = MatrixPool(layout.gate_up, layout.intermediate, layout.hidden, generator)
        self._down = MatrixPool(layout.down, layout.hidden, layout.intermediate, generator)

    def draw(self, generator: Generator) -> Tensor:
        """Return the bytes of an expert, uint8 [layout.n_bytes]."""
        blob = torch.empty(self.layout.n_bytes, dtype=torch.uint8)
        gate_up, down = sections(self.layout, blob)
        self._gate_up.fill(gate_up, generator, matrices=2)
        self._down.fill(down, generator)
        return blob


def random_matrix(packing: Packing, rows: int, columns: int, seed: int = 0) -> Tensor:
    """Return a random packed matrix, uint8 [tiles, tile bytes]."""
    generator = generator_for(seed, f"{packing.name} {rows} {columns}")
    stored = torch.empty(packing.stored_shape(rows, columns), dtype=packing.torch_dtype)
    MatrixPool(packing, rows, columns, generator).fill(stored, generator)
    return stored


def _stored(packing: AnyPacking, rows: int, columns: int, generator: Generator) -> Tensor:
    """Return `rows` random rows as the packing stores them."""
    if not isinstance(packing, Packing):
        values = generator.standard_normal((rows, columns), dtype=np.float32)
        return torch.from_numpy(values * columns**-0.5).to(packing.torch_dtype)
    groups = (rows, -(-columns // packing.group_size))
    codes = generator.integers(packing.max_code + 1, size=(rows, columns), dtype=np.uint8)
    least = max(1, packing.max_s // _MIN_S_SHARE)
    s = generator.integers(least, packing.max_s + 1, size=groups, dtype=np.int16)
    # A weight is ds·s·(code − middle) up to the rounding of M: mean 0 in each group.
    middle = packing.max_code / 2
    m_per_s = packing.max_m / packing.max_s
    m = np.round(s * m_per_s).astype(np.int16)
    mean_square = np.mean(np.arange(least, packing.max_s + 1) ** 2.0)
    variance = ((packing.max_code + 1) ** 2 - 1) / 12
    ds = generator.uniform(0.8, 1.2, rows) / np.sqrt(mean_square * variance * columns)
    matrix = QuantizedMatrix(
        codes=torch.from_numpy(codes),
        s=torch.from_numpy(s),
        m=torch.from_numpy(m),
        ds=torch.from_numpy(ds).half(),
        dm=torch.from_numpy(ds * middle / m_per_s).half(),
    )
    return pack(matrix, packing)
