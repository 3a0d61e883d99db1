"""Checks of tensors before their addresses go to a kernel. Each raises ValueError naming the
tensor.
"""

import torch
from torch import Tensor


def dense(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Of `dtype`, without gaps."""
    if tensor.dtype is not dtype or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected dense {dtype}, got {tensor.dtype}, strides {tuple(tensor.stride())}"
        )


def shape_of(name: str, tensor: Tensor, dtype: torch.dtype, dims: int) -> tuple[int, ...]:
    """The shape of a dense tensor of `dtype` with `dims` dimensions."""
    dense(name, tensor, dtype)
    if tensor.dim() != dims:
        raise ValueError(f"{name}: expected {dims} dimensions, got shape {tuple(tensor.shape)}")
    return tuple(tensor.shape)


def size_of(name: str, tensor: Tensor, need: int) -> None:
    """uint8, dense, at least `need` bytes, at a multiple of 16 (kernels read 16 bytes at a time)."""
    dense(name, tensor, torch.uint8)
    if tensor.numel() < need:
        raise ValueError(f"{name}: {tensor.numel()} bytes, {need} needed")
    if tensor.data_ptr() % 16:
        raise ValueError(f"{name}: its address is not a multiple of 16")
