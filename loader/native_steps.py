"""One token through a model on the processor: when its modules are as `TokenStep` takes them, and their weights."""

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from loader.head import NativeHead
from loader.kernels import PackedMatrix
from loader.layer import PackedDecoderLayer
from loader.modules import PackedLinear
from loader.norm import NativeNorm
from loader.token_step import ModelWeights, TokenStep

_log = logging.getLogger(__name__)


class NativeSteps:
    """The `loader.token_forward.Steps` of the native kernels, where all experts stay in RAM."""

    device = torch.device("cpu")
    norms: tuple[type, ...] = (NativeNorm,)
    layers: tuple[type, ...] = (PackedDecoderLayer,)

    def step(self, model: Any, last: TokenStep | None) -> TokenStep | None:
        """As `Steps.step`."""
        inner = model.model
        embedding, norm, head = inner.embed_tokens.weight, inner.norm.weight, _head(model.lm_head)
        layers = [layer.native_step(embedding.dtype) for layer in inner.layers]
        if None in layers:
            return None
        if len({(layer.structure.experts, layer.structure.top_k) for layer in layers}) > 1:
            say_once("layers use different numbers of experts: single tokens go layer by layer, a little slower")
            return None
        if min(inner.layers[0].mlp.experts.cache.slots) < layers[0].structure.experts:
            return None
        weights = ModelWeights(embedding, norm, inner.norm.variance_epsilon, head)
        if last is not None and last.is_of(layers, weights):
            return last
        return TokenStep(layers, weights) if weights.fit(layers[0].attention.dtype, self.device) else None


@functools.cache
def say_once(what: str) -> None:
    """Log `what`, the first time that it is said."""
    _log.info("%s", what)


def _head(module: Any) -> Tensor | PackedMatrix | None:
    """What the native step takes of the output head; None where it stays a module."""
    if module._parameters.get("bias") is not None:
        return None
    if type(module) is PackedLinear and module.backend_name == "native":
        return PackedMatrix(module.packed, module.packing.name, module.out_features)
    if type(module) is NativeHead and module.weight.dtype is torch.bfloat16:
        return module.weight
    return None
