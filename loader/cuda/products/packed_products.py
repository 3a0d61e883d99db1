"""Products of packed weights on a GPU: which kernel, which grid, for the matrices and experts of a
call.

The arithmetic, and so the bits, are the CPU's (docs/numerics.md). Nothing here waits for the GPU. A
wrong dtype, shape or size raises ValueError before anything is launched.
"""

import ctypes
from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from formats.expert import ExpertLayout
from formats.packing import Packing, blocks_of, tiles_of
from loader.cuda.device.device import Device
from loader.cuda.products.pairs import Pairs, passes
from loader.cuda.products.structures import MOST_EXPERTS, MOST_MATRICES, Experts, Groups, Matrices
from loader.cuda.products.tensor_checks import dense, shape_of, size_of

ACT_BYTES = 80
"""Of 64 quantized columns of one token."""
GEMV_TOKENS = (1, 2, 4, 8)
"""Token counts that have a kernel of their own; others take the next one."""
MOST_GRID_ROWS = 65535
"""CUDA's limit for all dimensions of a grid but the first."""
GEMM_TOKENS = 32
"""Tokens of one block of the kernels for many."""

_QUANTIZE = {
    torch.float32: "quantize_f32",
    torch.bfloat16: "quantize_bf16",
    torch.float16: "quantize_f16",
}

LinearMatrix = tuple[Tensor, Packing, int, Tensor]
"""Tiles, their packing, rows, and y: float32 [rows] that the product is written to."""


def acts_shape(tokens: int, columns: int) -> tuple[int, int, int]:
    """Of quantized activations, uint8: [tokens, blocks of 64, 80], whole superblocks."""
    return tokens, 4 * blocks_of(columns), ACT_BYTES


class Products:
    """Products with packed weights in the memory of `device`."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._hidden = torch.empty(0, dtype=torch.uint8)

    def quantize(self, x: Tensor) -> Tensor:
        """x [T, columns], float32, bfloat16 or float16, dense: its int8 form, uint8 [T, blocks of
        64, 80].
        """
        if x.dtype not in _QUANTIZE:
            raise ValueError(f"x: expected float32, bfloat16 or float16, got {x.dtype}")
        tokens, columns = shape_of("x", x, x.dtype, 2)
        acts = self._acts(tokens, columns)
        for begin in range(0, tokens, MOST_GRID_ROWS):
            rows, to = x[begin : begin + MOST_GRID_ROWS], acts[begin : begin + MOST_GRID_ROWS]
            grid = (-(-acts.shape[1] // 8), len(rows), 1)
            self._device.launch(
                _QUANTIZE[x.dtype], grid, 128, (rows, columns, to), reads=(rows,), writes=(to,)
            )
        return acts

    def linear(
        self, acts: Tensor, tiles: Tensor, packing: Packing, rows: int, columns: int
    ) -> Tensor:
        """The product of `acts` (of `quantize`, T tokens) with a packed matrix [rows, columns],
        transposed: float32 [T, rows].
        """
        tokens = _tokens(acts, columns)
        size_of("tiles", tiles, packing.matrix_bytes(rows, columns))
        y = self._floats(tokens, rows)
        if tokens == 0:
            return y
        if tokens <= GEMV_TOKENS[-1]:
            self._gemv(acts, [(tiles, packing, rows, y)], columns)()
        else:
            groups = Groups.of([(tiles, tokens)], GEMM_TOKENS)
            self._gemm(packing, groups, 0, rows, columns, acts, y, tiles)
        return y

    def prepare_linear(
        self, acts: Tensor, matrices: Sequence[LinearMatrix], columns: int
    ) -> Callable[[], None]:
        """What multiplies one token's `acts` [1, blocks of 64, 80] with several matrices (q, k, v)
        at each call: a launch for each packing. Tiles and results must stay where they are.
        """
        if _tokens(acts, columns) != 1:
            raise ValueError(f"acts: expected one token, got {acts.shape[0]}")
        for tiles, packing, rows, y in matrices:
            size_of("tiles", tiles, packing.matrix_bytes(rows, columns))
            if shape_of("y", y, torch.float32, 1) != (rows,):
                raise ValueError(f"y: expected {rows} rows, got {tuple(y.shape)}")
        launches = []
        for packing in dict.fromkeys(packing for _, packing, _, _ in matrices):
            same = [matrix for matrix in matrices if matrix[1] == packing]
            for begin in range(0, len(same), MOST_MATRICES):
                launches.append(self._gemv(acts, same[begin : begin + MOST_MATRICES], columns))
        if len(launches) == 1:
            return launches[0]

        def run() -> None:
            for launch in launches:
                launch()

        return run

    def token_experts(
        self, layout: ExpertLayout, acts: Tensor, weights: Tensor, out: Tensor
    ) -> "TokenExperts":
        """One token's experts of one layout: acts [1, blocks of 64, 80] of its x, weights float32
        [k] by rank, out float32 [hidden], all on the device; read and written at each `add`.
        """
        if _tokens(acts, layout.hidden) != 1:
            raise ValueError(f"acts: expected one token, got {acts.shape[0]}")
        shape_of("weights", weights, torch.float32, 1)
        if shape_of("out", out, torch.float32, 1) != (layout.hidden,):
            raise ValueError(f"out: expected [{layout.hidden}], got {tuple(out.shape)}")
        return TokenExperts(
            self._device, layout, acts, weights, out, self._shared_h(layout.intermediate)
        )

    def add_experts(
        self,
        blobs: dict[int, Tensor],
        layouts: dict[int, ExpertLayout],
        x: Tensor,
        index_host: Tensor,
        weights: Tensor,
        out: Tensor,
    ) -> None:
        """`loader.arithmetic.backend.Backend.experts` on the device; index_host is the router's
        choice on the CPU.
        """
        tokens, hidden = shape_of("x", x, torch.float32, 2)
        if shape_of("out", out, torch.float32, 2) != (tokens, hidden):
            raise ValueError(f"out: expected {tuple(x.shape)}, got {tuple(out.shape)}")
        if (
            shape_of("index", index_host, torch.int64, 2)[0] != tokens
            or weights.shape != index_host.shape
        ):
            raise ValueError(
                f"index {tuple(index_host.shape)}, weights {tuple(weights.shape)}, {tokens} tokens"
            )
        dense("weights", weights, torch.float32)
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
            work = [(blobs[expert], *part) for expert in run for part in pairs.parts(expert)]
            for begin, end in passes(work):
                self._pass(layout, work[begin:end], pairs, acts, weights, out)

    def _pass(
        self,
        layout: ExpertLayout,
        work: list[tuple[Tensor, int, int]],
        pairs: Pairs,
        acts: Tensor,
        weights: Tensor,
        out: Tensor,
    ) -> None:
        """Adds some experts (blob, range of pairs; the ranges lie side by side) to `out`."""
        gate_up, down = _tiled(layout)
        first, count = work[0][1], work[-1][2] - work[0][1]
        groups = Groups.of([(blob, end - begin) for blob, begin, end in work], GEMM_TOKENS)
        blobs = tuple(blob for blob, _, _ in work)
        h = self._acts(count, layout.intermediate)
        token = pairs.token[first : first + count]
        self._device.launch(
            f"gemm_gate_up_{_suffix(gate_up)}", (h.shape[1], groups.token_tiles, 1), 128,
            (groups, layout.hidden, layout.intermediate, acts, token, h), reads=(acts, token, *blobs), writes=(h,),
        )  # fmt: skip
        y = self._floats(count, layout.hidden)
        self._gemm(
            down, groups, layout.gate_up_bytes, layout.hidden, layout.intermediate, h, y, *blobs
        )
        tokens, hidden = out.shape
        self._device.launch(
            "add_pairs", (tokens, -(-hidden // 256), 1), 256,
            (y, pairs.place, pairs.rank, weights, first, count, weights.shape[1], hidden, out),
            reads=(y, pairs.place, pairs.rank, weights), writes=(out,),
        )  # fmt: skip

    def _gemv(
        self, acts: Tensor, matrices: Sequence[LinearMatrix], columns: int
    ) -> Callable[[], None]:
        tokens, packing = acts.shape[0], matrices[0][1]
        width = next(width for width in GEMV_TOKENS if width >= tokens)
        structure = Matrices.of([(tiles, y, rows) for tiles, _, rows, y in matrices])
        grid = (sum(tiles_of(rows) for _, _, rows, _ in matrices), 1, 1)
        return self._device.prepare(
            f"gemv_{_suffix(packing)}_t{width}", grid, 256 if width <= 4 else 128, (structure, columns, acts, tokens),
            reads=(acts, *(tiles for tiles, _, _, _ in matrices)), writes=[y for _, _, _, y in matrices],
        )  # fmt: skip

    def _gemm(
        self, packing: Packing, groups: Groups, offset: int, rows: int, columns: int, acts: Tensor, y: Tensor,
        *tiles: Tensor,
    ) -> None:  # fmt: skip
        grid = (-(-tiles_of(rows) // 4), groups.token_tiles, 1)
        args = groups, offset, rows, columns, acts, y
        self._device.launch(
            f"gemm_{_suffix(packing)}", grid, 128, args, reads=(acts, *tiles), writes=(y,)
        )

    def _acts(self, tokens: int, columns: int) -> Tensor:
        return torch.empty(
            acts_shape(tokens, columns), dtype=torch.uint8, device=self._device.torch_device
        )

    def _floats(self, tokens: int, rows: int) -> Tensor:
        return torch.empty(tokens, rows, dtype=torch.float32, device=self._device.torch_device)

    def _shared_h(self, intermediate: int) -> Tensor:
        """Room for the h of one launch. All layers share it: their launches come one after the
        other.
        """
        if self._hidden.numel() < MOST_EXPERTS * 4 * blocks_of(intermediate) * ACT_BYTES:
            self._hidden = self._acts(MOST_EXPERTS, intermediate).view(-1)
        return self._hidden


class TokenExperts:
    """One token's experts of one layout, a few at a time. Made by `Products.token_experts`."""

    def __init__(
        self,
        device: Device,
        layout: ExpertLayout,
        acts: Tensor,
        weights: Tensor,
        out: Tensor,
        h: Tensor,
    ) -> None:
        self._device, self._layout, self._n_bytes = device, layout, layout.n_bytes
        self._packings = _tiled(layout)
        self._acts, self._weights, self._out, self._h = acts, weights, out, h
        self._prepared: dict[int, Callable[[Sequence[tuple[int, Tensor]], bool], None]] = {}

    def add(self, blobs: Sequence[tuple[int, Tensor]], first: bool = False) -> None:
        """out += weights[rank] · expert(x) for each (rank, blob uint8 [n_bytes]), in this order:
        two launches for each eight. With `first`, out begins from zero.
        """
        for rank, blob in blobs:
            if not 0 <= rank < self._weights.numel():
                raise ValueError(f"rank {rank}: there are {self._weights.numel()} weights")
            size_of("blob", blob, self._n_bytes)
        if first and not blobs:
            self._out.zero_()
        for begin in range(0, len(blobs), MOST_EXPERTS):
            some = blobs[begin : begin + MOST_EXPERTS]
            if len(some) not in self._prepared:
                self._prepared[len(some)] = self._prepare(len(some))
            self._prepared[len(some)](some, first and begin == 0)

    def _prepare(self, count: int) -> Callable[[Sequence[tuple[int, Tensor]], bool], None]:
        """What launches the kernels for `count` experts. Between calls it holds none of their
        blobs.
        """
        layout, (gate_up, down) = self._layout, self._packings
        sizes = layout.hidden, layout.intermediate
        experts, overwrite = Experts(), ctypes.c_int64()
        reads = [self._acts], [self._h, self._weights]
        launches = (
            self._device.prepare(
                f"gate_up_token_{_suffix(gate_up)}", (4 * blocks_of(layout.intermediate), count, 1), 256,
                (experts, *sizes, self._acts, self._h), reads=reads[0], writes=(self._h,),
            ),
            self._device.prepare(
                f"down_token_{_suffix(down)}", (tiles_of(layout.hidden), 1, 1), 384,
                (experts, count, layout.gate_up_bytes, *sizes, self._h, self._weights, overwrite, self._out),
                reads=reads[1], writes=(self._out,),
            ),
        )  # fmt: skip
        own = tuple(len(part) for part in reads)

        def run(blobs: Sequence[tuple[int, Tensor]], first: bool) -> None:
            experts.set(blobs)
            overwrite.value = first
            for launch, part, length in zip(launches, reads, own, strict=True):
                part[length:] = [blob for _, blob in blobs]
                launch()
                del part[length:]

        return run


def _tiled(layout: ExpertLayout) -> tuple[Packing, Packing]:
    """The packings of gate and up, and of down."""
    if not isinstance(layout.gate_up, Packing) or not isinstance(layout.down, Packing):
        raise ValueError(f"experts of {layout.gate_up.name} and {layout.down.name}: expected tiles")
    return layout.gate_up, layout.down


def _suffix(packing: Packing) -> str:
    """The packing in kernels' names."""
    return packing.name.removeprefix("tile32-").replace("-", "_")


def _tokens(acts: Tensor, columns: int) -> int:
    tokens, *rest = shape_of("acts", acts, torch.uint8, 3)
    if (expected := list(acts_shape(tokens, columns)[1:])) != rest:
        raise ValueError(f"acts: {columns} columns take {expected} bytes, got {rest}")
    return tokens


def _check_expert(layout: ExpertLayout, blob: Tensor, hidden: int) -> None:
    if layout.hidden != hidden:
        raise ValueError(f"layout of {layout.hidden} columns, x has {hidden}")
    size_of("blob", blob, layout.n_bytes)
