"""Checks of tensors before their addresses go to the native library, and of its status after."""

import torch

from formats.native.abi import Status

_ERRORS = {
    Status.PACKING: "unknown packing",
    Status.SIZE: "a negative or too large size",
    Status.ISA: "this processor or build lacks the instruction set",
    Status.INDEX: "a token or expert index out of range, or an expert without bytes",
}


def check_status(code: int) -> None:
    """Raise MemoryError or ValueError for an error status of a native call."""
    if code == Status.MEMORY:
        raise MemoryError("native kernels: out of memory for the quantized activations")
    if code:
        raise ValueError(f"native kernels: {_ERRORS.get(Status(code), f'error {code}')}")


def check_dense(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError unless `tensor` is a contiguous CPU tensor of `dtype`."""
    if tensor.dtype is not dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous {dtype} CPU tensor, got {tensor.dtype} on"
            f" {tensor.device}, strides {tuple(tensor.stride())}"
        )


def matrix_shape(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> tuple[int, int]:
    """Return the shape of a dense matrix. ValueError for any other tensor."""
    check_dense(name, tensor, dtype)
    if tensor.dim() != 2:
        raise ValueError(f"{name}: expected 2 dimensions, got shape {tuple(tensor.shape)}")
    return tensor.shape[0], tensor.shape[1]


def vector_length(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> int:
    """Return the length of a dense vector. ValueError for any other tensor."""
    check_dense(name, tensor, dtype)
    if tensor.dim() != 1:
        raise ValueError(f"{name}: expected 1 dimension, got shape {tuple(tensor.shape)}")
    return tensor.shape[0]


def same_shape(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return `out`. ValueError unless it is dense float32 of the shape of x."""
    check_dense("out", out, torch.float32)
    if out.shape != x.shape:
        raise ValueError(f"out: expected shape {tuple(x.shape)}, got {tuple(out.shape)}")
    return out


def check_bytes(name: str, tensor: torch.Tensor, need: int) -> None:
    """Raise ValueError unless `tensor` is dense uint8 of at least `need` bytes."""
    check_dense(name, tensor, torch.uint8)
    if need < 0 or tensor.numel() < need:
        raise ValueError(f"{name}: {tensor.numel()} bytes, {max(need, 0)} needed")
