"""The native CPU kernels, called with checked arguments and without the GIL.

docs/numerics.md describes the arithmetic, loader/native/moe_kernels.h the C ABI. All tensors are
dense CPU tensors. A wrong dtype, shape or size raises ValueError before the library is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_void_p
from typing import NamedTuple

import torch

from formats.install import build_native
from formats.native.abi import DTYPES as ALL_DTYPES
from formats.native.abi import ISA_NAMES, ISAS
from loader.arithmetic.kernel_arguments import (
    check_bytes,
    check_status,
    matrix_shape,
    same_shape,
    vector_length,
)
from loader.arithmetic.native_library import Expert, find, library, packing_id

DTYPES = {dtype: ALL_DTYPES[dtype] for dtype in (torch.float32, torch.bfloat16)}
"""Dtypes of activations in native decoding -> their numbers in the C ABI."""
MAX_BF16_TOKENS = 8
"""Tokens up to which `linear_bf16` reads the weights once. Torch's product is faster for more."""


class PackedMatrix(NamedTuple):
    """One packed matrix: uint8 tiles, its packing's name, and its rows (outputs)."""

    tiles: torch.Tensor
    packing: str
    rows: int


class ExpertCall(NamedTuple):
    """One expert and its tokens.

    blob: uint8 [n_bytes]. gate_up, down: names of its packings. tokens: rows of x, int32 [n].
    weights: router weights, float32 [n].
    """

    blob: torch.Tensor
    gate_up: str
    down: str
    tokens: torch.Tensor
    weights: torch.Tensor


def available() -> bool:
    """True if the native library is found and has the right version; else warn once."""
    return find()[0] is not None


def describe() -> str:
    """Return one line that says which backend runs and why."""
    loaded, reason = find()
    if loaded is None:
        return f"torch (slow): {reason}; {build_native()}"
    return f"native, {loaded.moe_isa_reason().decode()}; {loaded.moe_threads()} threads; {reason}"


def isa() -> str:
    """The instruction set in use: "avx512", "avx2" or "portable"."""
    return ISA_NAMES[library().moe_isa()]


def set_isa(name: str) -> None:
    """Force an instruction set, for tests and benchmarks; "auto" undoes it.

    Raises ValueError if it cannot run here.
    """
    if name not in ISAS:
        raise ValueError(f"unknown instruction set {name!r}; known: {', '.join(ISAS)}")
    check_status(library().moe_set_isa(ISAS[name]))


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
    """Set the threads of later calls, the calling thread included; 0 means one per core.

    Return the number in force.
    """
    return int(library().moe_set_threads(threads))


def threads() -> int:
    """Return the threads of a call, the calling thread included."""
    return int(library().moe_threads())


def packed_bytes(packing: str, rows: int, columns: int) -> int:
    """Return the size of a packed matrix [rows, columns], in bytes."""
    return int(library().moe_packed_bytes(packing_id(packing), rows, columns))


def expert_bytes(gate_up: str, down: str, hidden: int, intermediate: int) -> int:
    """Return the size of one expert with these packings of its two sections, in bytes."""
    return int(
        library().moe_expert_bytes(packing_id(gate_up), packing_id(down), hidden, intermediate)
    )


def linear(x: torch.Tensor, tiles: torch.Tensor, packing: str, rows: int) -> torch.Tensor:
    """Return x [T, columns] · Wᵀ of a packed W [rows, columns]; all float32."""
    tokens, columns = matrix_shape("x", x, torch.float32)
    number = packing_id(packing)
    check_bytes("tiles", tiles, library().moe_packed_bytes(number, rows, columns))
    y = torch.empty((tokens, rows), dtype=torch.float32, device=x.device)
    check_status(
        library().moe_linear(
            number, tiles.data_ptr(), rows, columns, x.data_ptr(), y.data_ptr(), tokens
        )
    )
    return y


def linear_bf16(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x [T, columns] · weightᵀ, float32 [T, rows]; fast for T <= MAX_BF16_TOKENS.

    x: float32. weight: bfloat16 [rows, columns].
    """
    tokens, columns = matrix_shape("x", x, torch.float32)
    rows, inputs = matrix_shape("weight", weight, torch.bfloat16)
    if inputs != columns:
        raise ValueError(f"x has {columns} columns, weight has {inputs}")
    y = torch.empty((tokens, rows), dtype=torch.float32, device=x.device)
    check_status(
        library().moe_linear_bf16(
            weight.data_ptr(), rows, columns, x.data_ptr(), y.data_ptr(), tokens
        )
    )
    return y


def experts(
    x: torch.Tensor, calls: Sequence[ExpertCall], intermediate: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the router-weighted sum of experts, float32 [T, hidden], in the order of `calls`.

    x: float32 [T, hidden]. out: if given, the sum is added to it. Consecutive calls then give the
    bits of one call over the whole list.
    """
    tokens, hidden = matrix_shape("x", x, torch.float32)
    accumulate = out is not None
    out = torch.empty_like(x) if out is None else same_shape(out, x)
    entries = (Expert * len(calls))()
    for entry, call in zip(entries, calls, strict=True):
        entry.gate_up_packing, entry.down_packing = packing_id(call.gate_up), packing_id(call.down)
        need = library().moe_expert_bytes(
            entry.gate_up_packing, entry.down_packing, hidden, intermediate
        )
        check_bytes("blob", call.blob, need)
        count = vector_length("tokens", call.tokens, torch.int32)
        if vector_length("weights", call.weights, torch.float32) != count:
            raise ValueError(f"{count} tokens but {call.weights.numel()} weights")
        entry.blob, entry.tokens, entry.weights = (
            call.blob.data_ptr(),
            call.tokens.data_ptr(),
            call.weights.data_ptr(),
        )
        entry.token_count = count
    check_status(
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


def stream_sum(buffers: Sequence[torch.Tensor], chunk_bytes: int = 1 << 18) -> int:
    """Return the sum modulo 2^64 of all 64-bit words in uint8 tensors of equal length.

    Each byte is read once: this measures the memory's speed.
    """
    size = buffers[0].numel() if buffers else 0
    for buffer in buffers:
        check_bytes("buffer", buffer, size)
    pointers = (c_void_p * len(buffers))(*[buffer.data_ptr() for buffer in buffers])
    return int(library().moe_stream_sum(pointers, len(buffers), size, chunk_bytes))
