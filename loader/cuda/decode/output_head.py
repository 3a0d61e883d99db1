"""The output head of a decoder on a GPU."""

from collections.abc import Callable
from ctypes import c_void_p

import torch
from torch import Tensor

from loader.arithmetic.kernels import PackedMatrix
from loader.cuda.decode.gpu_layer import linear_matrix
from loader.cuda.decode.token_memory import Sizes, TokenMemory
from loader.cuda.device.device import Device
from loader.cuda.products.packed_products import Products
from loader.decode.weight_checks import check_dense

_HEAD_THREADS, _HEAD_ROWS = 256, 8
"""Threads and rows of one block of linear_bf16."""


def prepare_head(
    device: Device,
    products: Products,
    sizes: Sizes,
    memory: TokenMemory,
    head: Tensor | PackedMatrix | None,
) -> Callable[[], Tensor]:
    """Return a function that computes the head from the memory's `normed` and `acts`.

    Its result is a new [1, 1, rows] of the activations' dtype. head: bfloat16 [rows, hidden],
    packed, or None: the result is `normed` itself, [1, 1, hidden].
    """
    if isinstance(head, Tensor):
        return _bf16_head(device, sizes, memory, head)
    result = memory.normed
    launch = None
    if head is not None:
        result = memory.new(head.rows, torch.float32)
        matrices = [linear_matrix(head, result)]
        launch = products.prepare_linear(memory.acts, matrices, sizes.hidden)

    def run() -> Tensor:
        if launch:
            launch()
        return result.to(sizes.dtype, copy=True).view(1, 1, -1)

    return run


def _bf16_head(
    device: Device, sizes: Sizes, memory: TokenMemory, head: Tensor
) -> Callable[[], Tensor]:
    rows = len(head)
    check_dense("head", head, (rows, sizes.hidden), torch.bfloat16)
    if sizes.dtype is not torch.bfloat16:
        raise ValueError(f"head of bfloat16 needs activations of bfloat16, got {sizes.dtype}")
    address = c_void_p()
    args = head, memory.normed, rows, sizes.hidden, address
    launch = device.prepare("linear_bf16", (-(-rows // _HEAD_ROWS), 1, 1), _HEAD_THREADS, args)

    def run() -> Tensor:
        out = torch.empty((1, 1, rows), dtype=sizes.dtype, device=device.torch_device)
        address.value = out.data_ptr()
        launch()
        return out

    return run
