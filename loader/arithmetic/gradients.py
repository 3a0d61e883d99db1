"""Autograd over packed weights.

The forward pass keeps inputs only. The backward pass reads the packed bytes again and recomputes
the intermediate values. With gradients enabled, `Backend.for_gradients` computes the whole pass,
also the layers before the first trainable one.
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
    """Return `Backend.linear`, differentiable with respect to x if gradients are enabled."""
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
    """Return run(backend, x, index, weights), differentiable with respect to x and weights.

    differentiate: (x, index, weights, grad) -> (x's gradient, weights' gradient), where grad is the
    result's gradient. Without gradients enabled it is never called.
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
    """Log once that int8 products are not used."""
    _log.info(
        "gradients are enabled: activations are not rounded to int8;"
        " torch.no_grad() is 2.5 times as fast"
    )


def _check(backend: Backend) -> None:
    if backend.for_gradients is None:
        raise MoeConvertError(
            "gradients through packed weights are not implemented on a GPU"
            f" ({backend.torch_device})",
            'load the model with device="cpu"',
        )
