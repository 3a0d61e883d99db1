"""Checks of tensors before a kernel gets their addresses. Each raises ValueError with the name."""

import torch
from torch import Tensor


def check_dense(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError unless the tensor is contiguous and of `dtype`."""
    if tensor.dtype is not dtype or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected dense {dtype}, got {tensor.dtype}, strides {tuple(tensor.stride())}"
        )


def check_shape(name: str, tensor: Tensor, dtype: torch.dtype, dims: int) -> tuple[int, ...]:
    """Return the shape of a contiguous tensor of `dtype` with `dims` dimensions."""
    check_dense(name, tensor, dtype)
    if tensor.dim() != dims:
        raise ValueError(f"{name}: expected {dims} dimensions, got shape {tuple(tensor.shape)}")
    return tuple(tensor.shape)


def check_bytes(name: str, tensor: Tensor, need: int) -> None:
    """Raise ValueError unless the tensor is contiguous uint8 of at least `need` bytes.

    Its address must be a multiple of 16: kernels read 16 bytes at a time.
    """
    check_dense(name, tensor, torch.uint8)
    if tensor.numel() < need:
        raise ValueError(f"{name}: {tensor.numel()} bytes, {need} needed")
    if tensor.data_ptr() % 16:
        raise ValueError(f"{name}: its address is not a multiple of 16")
