"""The native CPU kernels: finding the library, checking arguments, calling it without the GIL.

The arithmetic stands in docs/numerics.md, the C ABI in loader/native/moe_kernels.h. All tensors are
dense CPU tensors; a wrong dtype, shape or size raises ValueError before the library is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof, byref, c_void_p
from typing import NamedTuple

import torch

from formats.native.abi import DTYPES as ALL_DTYPES
from formats.native.abi import ISA_NAMES, ISAS, Status
from loader.arithmetic.native_library import (
    FIX,
    Expert,
    LayerExperts,
    Matrix,
    Routing,
    find,
    library,
    packing_id,
)

_ACCUMULATE, _PARTIAL = 1, 2
DTYPES = {dtype: ALL_DTYPES[dtype] for dtype in (torch.float32, torch.bfloat16)}
"""Dtypes of activations that native steps take, with their numbers in the C ABI."""
_ERRORS = {
    Status.PACKING: "unknown packing",
    Status.SIZE: "a negative or too large size",
    Status.ISA: "this processor or build lacks the instruction set",
    Status.INDEX: "a token or expert index out of range, or an expert without bytes",
}


class PackedMatrix(NamedTuple):
    """One packed matrix: uint8 tiles, its packing's name, and its rows (outputs)."""

    tiles: torch.Tensor
    packing: str
    rows: int


class ExpertCall(NamedTuple):
    """One expert (uint8 blob), its packings' names, int32 token rows [n] and fp32 router weights
    [n].
    """

    blob: torch.Tensor
    gate_up: str
    down: str
    tokens: torch.Tensor
    weights: torch.Tensor


def available() -> bool:
    """Whether the native library is there and fits; logs a warning once where it is not."""
    return find()[0] is not None


def describe() -> str:
    """Which path runs and why, in one line."""
    loaded, reason = find()
    if loaded is None:
        return f"torch (slow): {reason}; {FIX}"
    return f"native, {loaded.moe_isa_reason().decode()}; {loaded.moe_threads()} threads; {reason}"


def isa() -> str:
    """The instruction set in use: "avx512", "avx2" or "portable"."""
    return ISA_NAMES[library().moe_isa()]


def set_isa(name: str) -> None:
    """Force an instruction set ("auto" undoes it): for tests and benchmarks. ValueError where it
    cannot run here.
    """
    if name not in ISAS:
        raise ValueError(f"unknown instruction set {name!r}; known: {', '.join(ISAS)}")
    _check(library().moe_set_isa(ISAS[name]))


def supported_isas() -> list[str]:
    """The instruction sets that run on this processor, fastest first."""
    native = library()
    before = (
        native.moe_isa()
        if native.moe_isa_reason().endswith(b"forced by moe_set_isa")
        else ISAS["auto"]
    )
    names = [name for name in ("avx512", "avx2", "portable") if native.moe_set_isa(ISAS[name]) == 0]
    native.moe_set_isa(before)
    return names


def set_threads(threads: int) -> int:
    """Threads of each later call, the calling one included; 0 means one per core. Returns the
    number in force.
    """
    return int(library().moe_set_threads(threads))


def threads() -> int:
    """Threads of a call."""
    return int(library().moe_threads())


def packed_bytes(packing: str, rows: int, columns: int) -> int:
    """Bytes of one packed matrix [rows, columns]."""
    return int(library().moe_packed_bytes(packing_id(packing), rows, columns))


def expert_bytes(gate_up: str, down: str, hidden: int, intermediate: int) -> int:
    """Bytes of one expert: its gate/up section in one packing, its down section in another."""
    return int(
        library().moe_expert_bytes(packing_id(gate_up), packing_id(down), hidden, intermediate)
    )


def linear(x: torch.Tensor, tiles: torch.Tensor, packing: str, rows: int) -> torch.Tensor:
    """x [T, columns] fp32 times a packed matrix [rows, columns], transposed: fp32 [T, rows]."""
    tokens, columns = _matrix_shape("x", x, torch.float32)
    number = packing_id(packing)
    _bytes("tiles", tiles, library().moe_packed_bytes(number, rows, columns))
    y = torch.empty((tokens, rows), dtype=torch.float32, device=x.device)
    _check(
        library().moe_linear(
            number, tiles.data_ptr(), rows, columns, x.data_ptr(), y.data_ptr(), tokens
        )
    )
    return y


def linear_many(x: torch.Tensor, matrices: Sequence[PackedMatrix]) -> list[torch.Tensor]:
    """Several matrices (q, k, v) over one quantized x [T, columns]: a list of fp32 [T, rows]."""
    tokens, columns = _matrix_shape("x", x, torch.float32)
    results, entries = [], (Matrix * len(matrices))()
    for entry, (tiles, packing, rows) in zip(entries, matrices, strict=True):
        entry.packing = packing_id(packing)
        _bytes("tiles", tiles, library().moe_packed_bytes(entry.packing, rows, columns))
        y = torch.empty((tokens, rows), dtype=torch.float32, device=x.device)
        results.append(y)
        entry.tiles, entry.rows, entry.y = tiles.data_ptr(), rows, y.data_ptr()
    _check(library().moe_linear_many(entries, len(matrices), columns, x.data_ptr(), tokens))
    return results


def linear_bf16(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, columns] fp32 times a bf16 weight [rows, columns], transposed: fp32 [T, rows]; for T <=
    8.
    """
    tokens, columns = _matrix_shape("x", x, torch.float32)
    rows, inputs = _matrix_shape("weight", weight, torch.bfloat16)
    if inputs != columns:
        raise ValueError(f"x has {columns} columns, weight has {inputs}")
    y = torch.empty((tokens, rows), dtype=torch.float32, device=x.device)
    _check(
        library().moe_linear_bf16(
            weight.data_ptr(), rows, columns, x.data_ptr(), y.data_ptr(), tokens
        )
    )
    return y


def experts(
    x: torch.Tensor, calls: Sequence[ExpertCall], intermediate: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Router-weighted sum of experts over x [T, hidden] fp32, in the order of `calls`: fp32 [T,
    hidden].

    With `out`, adds to it and returns it; consecutive calls then give the bits of one call over the
    whole list.
    """
    tokens, hidden = _matrix_shape("x", x, torch.float32)
    accumulate = out is not None
    out = torch.empty_like(x) if out is None else _same_shape(out, x)
    entries = (Expert * len(calls))()
    for entry, call in zip(entries, calls, strict=True):
        entry.gate_up_packing, entry.down_packing = packing_id(call.gate_up), packing_id(call.down)
        need = library().moe_expert_bytes(
            entry.gate_up_packing, entry.down_packing, hidden, intermediate
        )
        _bytes("blob", call.blob, need)
        count = _vector_length("tokens", call.tokens, torch.int32)
        if _vector_length("weights", call.weights, torch.float32) != count:
            raise ValueError(f"{count} tokens but {call.weights.numel()} weights")
        entry.blob, entry.tokens, entry.weights = (
            call.blob.data_ptr(),
            call.tokens.data_ptr(),
            call.weights.data_ptr(),
        )
        entry.token_count = count
    _check(
        library().moe_experts(
            entries,
            len(calls),
            hidden,
            intermediate,
            x.data_ptr(),
            out.data_ptr(),
            tokens,
            accumulate,
        )
    )
    return out


class ExpertTable:
    """One layer's experts by number, checked once, for calls with a router's own answer.

    Holds a reference to each blob that is set. Not to be changed while a call runs.
    """

    def __init__(
        self, experts: int, hidden: int, intermediate: int, gate_up: str, down: str
    ) -> None:
        self._run = library().moe_experts_topk
        self._hidden, self._count = hidden, experts
        self.expert_bytes = expert_bytes(gate_up, down, hidden, intermediate)
        self._pointers = (c_void_p * experts)()
        self._experts = LayerExperts(
            blobs=addressof(self._pointers),
            hidden=hidden,
            intermediate=intermediate,
            count=experts,
            gate_up_packing=packing_id(gate_up),
            down_packing=packing_id(down),
        )
        self._blobs: list[torch.Tensor | None] = [None] * experts

    def set(self, expert: int, blob: torch.Tensor | None) -> None:
        """Put an expert's bytes (uint8, at least `expert_bytes`) or take them away."""
        if not 0 <= expert < self._count:
            raise ValueError(f"expert {expert}: the table has {self._count}")
        if blob is not None:
            _bytes("blob", blob, self.expert_bytes)
        self._blobs[expert] = blob
        self._pointers[expert] = None if blob is None else blob.data_ptr()

    def run(
        self,
        x: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor | None = None,
        partial: bool = False,
    ) -> torch.Tensor:
        """x fp32 [T, hidden], index int64 [T, k], weights fp32 [T, k]: fp32 [T, hidden], experts in
        ascending order.

        With `out`, adds to it and returns it. ValueError where a token uses an expert that is not
        set; `partial` leaves such pairs out instead (calls over ascending parts of the experts give
        the bits of one call over all).
        """
        tokens, hidden = _matrix_shape("x", x, torch.float32)
        top_k = _matrix_shape("index", index, torch.int64)[1]
        _dense("weights", weights, torch.float32)
        if hidden != self._hidden or index.shape[0] != tokens or weights.shape != index.shape:
            raise ValueError(
                f"x {tuple(x.shape)}, index {tuple(index.shape)}, weights {tuple(weights.shape)}: "
                f"expected [T, {self._hidden}], [T, k], [T, k]"
            )
        flags = (0 if out is None else _ACCUMULATE) | (_PARTIAL if partial else 0)
        out = torch.empty_like(x) if out is None else _same_shape(out, x)
        routing = Routing(index.data_ptr(), weights.data_ptr(), tokens, top_k)
        _check(self._run(byref(self._experts), byref(routing), x.data_ptr(), out.data_ptr(), flags))
        return out


def stream_sum(buffers: Sequence[torch.Tensor], chunk_bytes: int = 1 << 18) -> int:
    """Sum modulo 2^64 of the 64-bit words of equally long uint8 tensors, each read once."""
    size = buffers[0].numel() if buffers else 0
    for buffer in buffers:
        _bytes("buffer", buffer, size)
    pointers = (c_void_p * len(buffers))(*[buffer.data_ptr() for buffer in buffers])
    return int(library().moe_stream_sum(pointers, len(buffers), size, chunk_bytes))


def empty_region_us(repeats: int = 1000) -> float:
    """Microseconds of one empty parallel region: shows how far apart the host has put the cores."""
    return float(library().moe_empty_region_us(repeats))


def _check(code: int) -> None:
    if code == Status.MEMORY:
        raise MemoryError("native kernels: out of memory for the quantized activations")
    if code:
        raise ValueError(f"native kernels: {_ERRORS.get(Status(code), f'error {code}')}")


def _dense(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype is not dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous {dtype} CPU tensor, got {tensor.dtype} on {tensor.device}, "
            f"strides {tuple(tensor.stride())}"
        )


def _matrix_shape(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> tuple[int, int]:
    _dense(name, tensor, dtype)
    if tensor.dim() != 2:
        raise ValueError(f"{name}: expected 2 dimensions, got shape {tuple(tensor.shape)}")
    return tensor.shape[0], tensor.shape[1]


def _vector_length(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> int:
    _dense(name, tensor, dtype)
    if tensor.dim() != 1:
        raise ValueError(f"{name}: expected 1 dimension, got shape {tuple(tensor.shape)}")
    return tensor.shape[0]


def _same_shape(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    _dense("out", out, torch.float32)
    if out.shape != x.shape:
        raise ValueError(f"out: expected shape {tuple(x.shape)}, got {tuple(out.shape)}")
    return out


def _bytes(name: str, tensor: torch.Tensor, need: int) -> None:
    _dense(name, tensor, torch.uint8)
    if need < 0 or tensor.numel() < need:
        raise ValueError(f"{name}: {tensor.numel()} bytes, {max(need, 0)} needed")
