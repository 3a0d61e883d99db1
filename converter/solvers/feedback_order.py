"""Order in which error feedback takes the groups of a matrix: strongest inputs first.

Later columns compensate the error of a column, so the columns that matter most come first. GPTQ's
act-order moves columns; this order moves whole groups, because the columns of a group share a scale
that is chosen when the group's turn comes. The packing stores groups at their original position.
"""

import torch
from torch import Tensor

from formats.tiles import QuantizedMatrix


def group_order(hessian: Tensor, columns: int, group_size: int) -> Tensor | None:
    """Return the groups by descending mean square of their inputs, int32 [groups].

    Groups stay in their block of the Hessian. hessian: float32 [blocks, width, width]. Returns None
    if `columns` or `width` is no multiple of group_size.
    """
    width = hessian.shape[1]
    if columns % group_size or width % group_size:
        return None
    squares = hessian.diagonal(dim1=1, dim2=2).reshape(-1)[:columns]
    strength = squares.view(-1, group_size).mean(1)
    order = []
    groups_per_block = width // group_size
    for begin in range(0, len(strength), groups_per_block):
        block = strength[begin : begin + groups_per_block]
        order.append(begin + block.argsort(descending=True, stable=True))
    return torch.cat(order).int()


def columns_in_order(order: Tensor, group_size: int) -> Tensor:
    """Return the original column at each new position, int64 [columns]."""
    return (order.long()[:, None] * group_size + torch.arange(group_size)).flatten()


def hessian_in_order(hessian: Tensor, order: Tensor | None, group_size: int) -> Tensor:
    """Return the Hessian of the reordered columns, [blocks, width, width]."""
    if order is None:
        return hessian
    blocks, width, _ = hessian.shape
    columns = columns_in_order(order, group_size)
    result = torch.zeros_like(hessian)
    for index in range(blocks):
        in_block = columns[index * width : (index + 1) * width] - index * width
        n = len(in_block)
        result[index, :n, :n] = hessian[index][in_block[:, None], in_block]
    return result


def matrix_in_place(matrix: QuantizedMatrix, order: Tensor, group_size: int) -> QuantizedMatrix:
    """Return a matrix of reordered columns with its columns back at their original position."""
    columns = columns_in_order(order, group_size).argsort()
    groups = order.argsort()
    return QuantizedMatrix(
        matrix.codes[:, columns], matrix.s[:, groups], matrix.m[:, groups], matrix.ds, matrix.dm
    )
