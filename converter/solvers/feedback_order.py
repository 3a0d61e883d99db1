"""In which order error feedback takes a matrix's groups: those first whose inputs are strongest.

An error is made up for by the columns that are still to come, so what matters most should have most
of them. Whole groups are taken, not columns as in GPTQ's act-order: a group's columns share a
scale, which is chosen when its turn comes. Where the groups stand in the packing stays as it is.
"""

import torch
from torch import Tensor

from formats.packing import QuantizedMatrix


def group_order(hessian: Tensor, columns: int, group_size: int) -> Tensor | None:
    """int32 [groups]: the groups by falling mean square of their inputs, within each block of the
    Hessian.

    hessian: float32 [blocks, width, width], width a multiple of group_size. None where columns are
    no multiple of it.
    """
    if columns % group_size or hessian.shape[1] % group_size:
        return None
    strength = hessian.diagonal(dim1=1, dim2=2).reshape(-1)[:columns].view(-1, group_size).mean(1)
    order, a_block = [], hessian.shape[1] // group_size
    for begin in range(0, len(strength), a_block):
        order.append(
            begin + strength[begin : begin + a_block].argsort(descending=True, stable=True)
        )
    return torch.cat(order).int()


def columns_in_order(order: Tensor, group_size: int) -> Tensor:
    """int64 [columns]: which column stands where."""
    return (order.long()[:, None] * group_size + torch.arange(group_size)).flatten()


def hessian_in_order(hessian: Tensor, order: Tensor | None, group_size: int) -> Tensor:
    """The Hessian of the columns in that order; of the same shape."""
    if order is None:
        return hessian
    blocks, width, _ = hessian.shape
    columns = columns_in_order(order, group_size)
    result = torch.zeros_like(hessian)
    for index in range(blocks):
        own = columns[index * width : (index + 1) * width] - index * width
        result[index, : len(own), : len(own)] = hessian[index][own[:, None], own]
    return result


def matrix_in_place(matrix: QuantizedMatrix, order: Tensor, group_size: int) -> QuantizedMatrix:
    """A matrix of columns in that order, its columns back where they belong."""
    columns, groups = columns_in_order(order, group_size).argsort(), order.argsort()
    return QuantizedMatrix(
        matrix.codes[:, columns], matrix.s[:, groups], matrix.m[:, groups], matrix.ds, matrix.dm
    )
