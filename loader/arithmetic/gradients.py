"""Autograd over packed weights.

The forward pass keeps inputs only; the backward reads the packed bytes again and recomputes what
lies between. With gradients enabled all of a pass is computed by `Backend.for_gradients`, also what
comes before the first trainable part.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from formats.errors import MoeConvertError
from formats.packing import Packing
from loader.arithmetic.backend import Backend
from loader.arithmetic.torch_product import input_gradient

_log = logging.getLogger(__name__)

RunExperts = Callable[[Backend, Tensor, Tensor, Tensor], Tensor]
ExpertGradients = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def linear(
    backend: Backend, tiles: Tensor, packing: Packing, rows: int, columns: int, x: Tensor
) -> Tensor:
    """As `Backend.linear`; with gradients enabled, the result has one with respect to x."""
    if torch.is_grad_enabled():
        result: Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
            x, tiles, packing, rows, columns, backend
        )
        return result
    return backend.linear(tiles, packing, rows, columns, x)


def experts(
    backend: Backend,
    run: RunExperts,
    differentiate: ExpertGradients,
    x: Tensor,
    index: Tensor,
    weights: Tensor,
) -> Tensor:
    """run(backend, x, index, weights); with gradients enabled, the result has them with respect to
    x and weights.

    differentiate(x, index, weights, grad) gives these for the result's gradient `grad`.
    """
    if torch.is_grad_enabled():
        result: Tensor = _Experts.apply(  # type: ignore[no-untyped-call]
            x, weights, index, run, differentiate, backend
        )
        return result
    return run(backend, x, index, weights)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        tiles: Tensor,
        packing: Packing,
        rows: int,
        columns: int,
        backend: Backend,
    ) -> Tensor:
        ctx.save_for_backward(tiles)
        ctx.matrix, ctx.backend = (packing, rows, columns), backend
        return _precise(backend).linear(tiles, packing, rows, columns, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _check(ctx.backend)
        (tiles,), (packing, rows, columns) = ctx.saved_tensors, ctx.matrix
        with torch.autocast(grad.device.type, enabled=False):
            return input_gradient(tiles, packing, rows, columns, grad), None, None, None, None, None


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        index: Tensor,
        run: RunExperts,
        differentiate: ExpertGradients,
        backend: Backend,
    ) -> Tensor:
        ctx.save_for_backward(x, weights, index)
        ctx.differentiate, ctx.backend = differentiate, backend
        return run(_precise(backend), x, index, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _check(ctx.backend)
        x, weights, index = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            x_grad, weights_grad = ctx.differentiate(x, index, weights, grad)
        return x_grad.to(x.dtype), weights_grad.to(weights.dtype), None, None, None, None


def _precise(backend: Backend) -> Backend:
    precise = backend.for_gradients
    if precise is None or precise is backend:
        return backend
    _log_precise()
    return precise


@cache
def _log_precise() -> None:
    """Logs once why the int8 products are not taken."""
    _log.info(
        "gradients are enabled: activations are not rounded to int8; torch.no_grad() is 2.5 times as fast"
    )


def _check(backend: Backend) -> None:
    if backend.for_gradients is None:
        raise MoeConvertError(
            f"gradients through packed weights are not implemented on a GPU ({backend.torch_device})",
            'load the model with device="cpu"',
        )
