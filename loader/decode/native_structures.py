"""A model's weights as structures of the native kernels (loader/native/moe_kernels.h).

Structures hold addresses: the caller keeps the weights alive. Sizes and dtypes are checked here;
ValueError if they do not fit.
"""

import torch
from torch import Tensor

from loader.arithmetic import kernels
from loader.arithmetic.kernels import PackedMatrix
from loader.arithmetic.native_library import Attention, Layer, Matrix, packing_id
from loader.decode.weight_checks import check_dense, check_matrix
from loader.decode.weights import LayerWeights, ModelWeights

_HEAD_BF16 = -1
"""Packing number of a head in bfloat16 rows (moe_model)."""


def attention_structure(weights: LayerWeights, hidden: int, dtype: torch.dtype) -> Attention:
    """Return a layer's attention over activations of `dtype`."""
    structure = Attention(
        hidden=hidden, head_dim=weights.head_dim, scale=weights.scale, dtype=kernels.DTYPES[dtype]
    )
    attention = weights.attention
    for name, matrix, columns in (
        ("q", attention.q, hidden),
        ("k", attention.k, hidden),
        ("v", attention.v, hidden),
        ("o", attention.o, attention.q.rows),
    ):
        setattr(structure, name, _matrix(name, matrix, columns))
    return structure


def layer_structure(weights: LayerWeights, hidden: int, dtype: torch.dtype) -> Layer:
    """Return a decoder layer.

    Only its first half can run natively if its experts have several layouts, or plain rows.
    """
    check_dense("attention norm", weights.attention_norm, (hidden,), dtype)
    check_dense("experts norm", weights.experts_norm, (hidden,), dtype)
    check_dense("router", weights.router, (weights.experts, hidden), dtype)
    structure = Layer(
        attention=attention_structure(weights, hidden, dtype),
        attention_norm=weights.attention_norm.data_ptr(),
        experts_norm=weights.experts_norm.data_ptr(),
        router=weights.router.data_ptr(),
        attention_eps=weights.attention_eps,
        experts_eps=weights.experts_eps,
        experts=weights.experts,
        top_k=weights.top_k,
        gate_up_packing=-1,
        down_packing=-1,
    )
    layout = weights.layout
    if layout is not None:
        if layout.hidden != hidden:
            raise ValueError(f"experts for {layout.hidden} values, attention for {hidden}")
        structure.intermediate = layout.intermediate
        structure.gate_up_packing = packing_id(layout.gate_up.name)
        structure.down_packing = packing_id(layout.down.name)
    return structure


def head_structure(weights: ModelWeights) -> Matrix:
    """Return the output head; empty if it stays a module."""
    head = weights.head
    if head is None:
        return Matrix()
    if isinstance(head, Tensor):
        check_dense("head", head, (head.shape[0], weights.hidden), torch.bfloat16)
        return Matrix(tiles=head.data_ptr(), rows=head.shape[0], packing=_HEAD_BF16)
    return _matrix("head", head, weights.hidden)


def check_model(weights: ModelWeights) -> None:
    """Raise ValueError unless embedding and final norm fit together."""
    check_dense("embedding", weights.embedding, tuple(weights.embedding.shape), weights.dtype)
    check_dense("norm", weights.norm, (weights.hidden,), weights.dtype)


def _matrix(name: str, matrix: PackedMatrix, columns: int) -> Matrix:
    check_matrix(name, matrix, columns)
    return Matrix(
        tiles=matrix.tiles.data_ptr(), rows=matrix.rows, packing=packing_id(matrix.packing)
    )
