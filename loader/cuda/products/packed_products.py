"""Products of packed weights on a GPU: the kernels and grids for matrices and experts."""

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from formats.expert import ExpertLayout
from formats.packing import Packing, blocks_of, tiles_of
from loader.cuda.device.device import Device
from loader.cuda.products.kernel_layouts import (
    ACT_BYTES,
    acts_shape,
    packing_suffix,
    tile_packings,
)
from loader.cuda.products.pairs import ExpertPairs, Pairs, passes
from loader.cuda.products.structures import (
    MAX_EXPERTS,
    MAX_MATRICES,
    Groups,
    LinearMatrix,
    Matrices,
    PairLists,
)
from loader.cuda.products.tensor_checks import check_bytes, check_dense, check_shape
from loader.cuda.products.token_experts import TokenExperts

GEMV_TOKENS = (1, 2, 4, 8)
"""Token counts with a GEMV kernel; other counts use the next larger kernel."""
GEMM_TOKENS = 32
"""Tokens of one block of the GEMM kernels (kTokenTile)."""
MAX_GRID_ROWS = 65535
"""CUDA's limit for all dimensions of a grid but the first."""

_QUANTIZE_THREADS = 128
_GEMM_THREADS = 128
_ADD_PAIRS_THREADS = 256
_QUANTIZE = {
    torch.float32: "quantize_f32",
    torch.bfloat16: "quantize_bf16",
    torch.float16: "quantize_f16",
}


class Products:
    """Products with packed weights in the memory of `device`."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._hidden = torch.empty(0, dtype=torch.uint8)

    def quantize(self, x: Tensor) -> Tensor:
        """Return the acts of x, uint8 [T, blocks of 64 columns, 80].

        x: contiguous float32, bfloat16 or float16 [T, columns].
        """
        if x.dtype not in _QUANTIZE:
            raise ValueError(f"x: expected float32, bfloat16 or float16, got {x.dtype}")
        tokens, columns = check_shape("x", x, x.dtype, 2)
        acts = self._new_acts(tokens, columns)
        for begin in range(0, tokens, MAX_GRID_ROWS):
            rows = x[begin : begin + MAX_GRID_ROWS]
            to = acts[begin : begin + MAX_GRID_ROWS]
            self._device.launch(
                _QUANTIZE[x.dtype],
                (-(-acts.shape[1] // 8), len(rows), 1),
                _QUANTIZE_THREADS,
                (rows, columns, to),
                reads=(rows,),
                writes=(to,),
            )
        return acts

    def linear(
        self, acts: Tensor, tiles: Tensor, packing: Packing, rows: int, columns: int
    ) -> Tensor:
        """Return acts · Wᵀ, float32 [T, rows], for a packed matrix W [rows, columns].

        acts: a result of `quantize`.
        """
        tokens = _tokens(acts, columns)
        check_bytes("tiles", tiles, packing.matrix_bytes(rows, columns))
        y = self._new_floats(tokens, rows)
        if tokens == 0:
            return y
        if tokens <= GEMV_TOKENS[-1]:
            self._gemv(acts, [LinearMatrix(tiles, packing, rows, y)], columns)()
        else:
            groups = Groups.pack([(tiles, tokens)], GEMM_TOKENS)
            self._gemm(packing, groups, 0, rows, acts, y, (tiles,), columns=columns)
        return y

    def prepare_linear(
        self, acts: Tensor, matrices: Sequence[LinearMatrix], columns: int
    ) -> Callable[[], None]:
        """Return a function that multiplies one token's acts with several matrices.

        acts: [1, blocks of 64 columns, 80], read at each call. Matrices of one packing share a
        launch, up to MAX_MATRICES. Tiles and results must keep their addresses.
        """
        if _tokens(acts, columns) != 1:
            raise ValueError(f"acts: expected one token, got {acts.shape[0]}")
        for matrix in matrices:
            check_bytes("tiles", matrix.tiles, matrix.packing.matrix_bytes(matrix.rows, columns))
            if check_shape("y", matrix.y, torch.float32, 1) != (matrix.rows,):
                raise ValueError(f"y: expected {matrix.rows} rows, got {tuple(matrix.y.shape)}")
        launches = []
        for packing in dict.fromkeys(matrix.packing for matrix in matrices):
            same = [matrix for matrix in matrices if matrix.packing == packing]
            for begin in range(0, len(same), MAX_MATRICES):
                launches.append(self._gemv(acts, same[begin : begin + MAX_MATRICES], columns))
        if len(launches) == 1:
            return launches[0]

        def run() -> None:
            for launch in launches:
                launch()

        return run

    def token_experts(
        self, layout: ExpertLayout, acts: Tensor, weights: Tensor, out: Tensor
    ) -> TokenExperts:
        """Return one token's experts of one layout; each `add` reads and writes these tensors.

        acts: the experts' input, [1, blocks of 64 columns, 80]. weights: float32 [k] by rank. out:
        float32 [hidden]. All on the device.
        """
        if _tokens(acts, layout.hidden) != 1:
            raise ValueError(f"acts: expected one token, got {acts.shape[0]}")
        check_shape("weights", weights, torch.float32, 1)
        if check_shape("out", out, torch.float32, 1) != (layout.hidden,):
            raise ValueError(f"out: expected [{layout.hidden}], got {tuple(out.shape)}")
        h = self._shared_h(layout.intermediate)
        return TokenExperts(self._device, layout, acts, weights, out, h)

    def add_experts(
        self,
        blobs: dict[int, Tensor],
        layouts: dict[int, ExpertLayout],
        x: Tensor,
        index_host: Tensor,
        weights: Tensor,
        out: Tensor,
    ) -> None:
        """Add the experts to `out` (`loader.arithmetic.backend.Backend.experts`).

        index_host: the experts that the router chose, int64 [T, k] on the CPU. All other tensors
        are on the device.
        """
        tokens, hidden = check_shape("x", x, torch.float32, 2)
        if check_shape("out", out, torch.float32, 2) != (tokens, hidden):
            raise ValueError(f"out: expected {tuple(x.shape)}, got {tuple(out.shape)}")
        index_tokens = check_shape("index", index_host, torch.int64, 2)[0]
        if index_tokens != tokens or weights.shape != index_host.shape:
            raise ValueError(
                f"index {tuple(index_host.shape)}, weights {tuple(weights.shape)}, {tokens} tokens"
            )
        check_dense("weights", weights, torch.float32)
        for expert, blob in blobs.items():
            _check_expert(layouts[expert], blob, hidden)
        if tokens == 0 or not blobs:
            return
        acts = self.quantize(x)
        runs = groupby(sorted(blobs), key=lambda expert: layouts[expert])
        if tokens == 1:
            ranks = {expert: rank for rank, expert in enumerate(index_host[0].tolist())}
            for layout, run in runs:
                chosen = [(ranks[expert], blobs[expert]) for expert in run if expert in ranks]
                self.token_experts(layout, acts, weights[0], out[0]).add(chosen)
            return
        pairs = Pairs(index_host, self._device.torch_device)
        for layout, run in runs:
            work = [
                ExpertPairs(blobs[expert], begin, end)
                for expert in run
                for begin, end in pairs.parts(expert)
            ]
            for one_pass in passes(work):
                self._add_pass(layout, one_pass, pairs, acts, weights, out)

    def _add_pass(
        self,
        layout: ExpertLayout,
        work: Sequence[ExpertPairs],
        pairs: Pairs,
        acts: Tensor,
        weights: Tensor,
        out: Tensor,
    ) -> None:
        """Add one pass of `pairs` to `out`."""
        gate_up, down = tile_packings(layout)
        begin = work[0].begin
        count = work[-1].end - begin
        groups = Groups.pack([(one.blob, one.end - one.begin) for one in work], GEMM_TOKENS)
        blobs = tuple(one.blob for one in work)
        h = self._new_acts(count, layout.intermediate)
        token = pairs.token[begin : begin + count]
        self._device.launch(
            f"gemm_gate_up_{packing_suffix(gate_up)}",
            (h.shape[1], groups.token_tiles, 1),
            _GEMM_THREADS,
            (groups, layout.hidden, layout.intermediate, acts, token, h),
            reads=(acts, token, *blobs),
            writes=(h,),
        )
        y = self._new_floats(count, layout.hidden)
        offset = layout.gate_up_bytes
        self._gemm(down, groups, offset, layout.hidden, h, y, blobs, columns=layout.intermediate)
        tokens, hidden = out.shape
        lists = PairLists(
            place=pairs.place.data_ptr(),
            rank=pairs.rank.data_ptr(),
            begin=begin,
            count=count,
            top_k=weights.shape[1],
        )
        self._device.launch(
            "add_pairs",
            (tokens, -(-hidden // _ADD_PAIRS_THREADS), 1),
            _ADD_PAIRS_THREADS,
            (lists, y, weights, hidden, out),
            reads=(y, pairs.place, pairs.rank, weights),
            writes=(out,),
        )

    def _gemv(
        self, acts: Tensor, matrices: Sequence[LinearMatrix], columns: int
    ) -> Callable[[], None]:
        tokens = acts.shape[0]
        packing = matrices[0].packing
        width = next(width for width in GEMV_TOKENS if width >= tokens)
        structure = Matrices.pack(matrices)
        return self._device.prepare(
            f"gemv_{packing_suffix(packing)}_t{width}",
            (sum(tiles_of(matrix.rows) for matrix in matrices), 1, 1),
            256 if width <= 4 else 128,
            (structure, columns, acts, tokens),
            reads=(acts, *(matrix.tiles for matrix in matrices)),
            writes=[matrix.y for matrix in matrices],
        )

    def _gemm(
        self,
        packing: Packing,
        groups: Groups,
        offset: int,
        rows: int,
        acts: Tensor,
        y: Tensor,
        blobs: Sequence[Tensor],
        *,
        columns: int,
    ) -> None:
        """Launch y = acts · Wᵀ for each group; `offset`: byte of W [rows, columns] in its blob."""
        self._device.launch(
            f"gemm_{packing_suffix(packing)}",
            (-(-tiles_of(rows) // 4), groups.token_tiles, 1),
            _GEMM_THREADS,
            (groups, offset, rows, columns, acts, y),
            reads=(acts, *blobs),
            writes=(y,),
        )

    def _new_acts(self, tokens: int, columns: int) -> Tensor:
        shape = acts_shape(tokens, columns)
        return torch.empty(shape, dtype=torch.uint8, device=self._device.torch_device)

    def _new_floats(self, tokens: int, rows: int) -> Tensor:
        return torch.empty(tokens, rows, dtype=torch.float32, device=self._device.torch_device)

    def _shared_h(self, intermediate: int) -> Tensor:
        """Return memory for the h of one launch. All layers share it: launches run in order."""
        if self._hidden.numel() < MAX_EXPERTS * 4 * blocks_of(intermediate) * ACT_BYTES:
            self._hidden = self._new_acts(MAX_EXPERTS, intermediate).view(-1)
        return self._hidden


def _tokens(acts: Tensor, columns: int) -> int:
    tokens, *rest = check_shape("acts", acts, torch.uint8, 3)
    expected = list(acts_shape(tokens, columns)[1:])
    if expected != rest:
        raise ValueError(f"acts: {columns} columns take {expected} bytes, got {rest}")
    return tokens


def _check_expert(layout: ExpertLayout, blob: Tensor, hidden: int) -> None:
    if layout.hidden != hidden:
        raise ValueError(f"layout of {layout.hidden} columns, x has {hidden}")
    check_bytes("blob", blob, layout.n_bytes)
