"""One token through a model on a GPU: when its modules are as `CudaTokenStep` takes them, and their weights."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer, MixtralRMSNorm

from loader.attention import PackedAttention
from loader.backend import Backend
from loader.cuda.cpu_share import CpuShare
from loader.cuda.device import Device
from loader.cuda.layer_step import fits
from loader.cuda.products import Products
from loader.cuda.token_memory import Sizes
from loader.cuda.token_step import CudaTokenStep, LayerParts
from loader.head import NativeHead
from loader.kernels import PackedMatrix
from loader.layer import PackedDecoderLayer
from loader.layer_state import attention_state, dense_state, is_mixtral
from loader.layer_step import LayerWeights
from loader.modules import CachedExperts, PackedLinear
from loader.native_steps import say_once
from loader.norm import NativeNorm
from loader.step_kernels import AttentionWeights
from loader.token_forward import one_token
from loader.token_step import ModelWeights
from loader.torch_threads import Shortcut


def one_token_on(
    device: Device, products: Products, share: CpuShare | None = None, cpu: Backend | None = None
) -> Shortcut:
    """As `loader.token_forward.one_token`, for models that are, experts as well, on `device`; share: which
    experts the CPU computes, by the backend `cpu`."""

    def first(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return one_token(model, args, kwargs, lambda: CudaSteps(device, products, share, cpu))

    return first


class CudaSteps:
    """The `loader.token_forward.Steps` of one GPU."""

    norms: tuple[type, ...] = (MixtralRMSNorm, NativeNorm)
    layers: tuple[type, ...] = (MixtralDecoderLayer, PackedDecoderLayer)

    def __init__(self, device: Device, products: Products, share: CpuShare | None, cpu: Backend | None) -> None:
        self.device = device.torch_device
        self._parts, self._cpu = (device, products), (share, cpu)

    def step(self, model: Any, last: CudaTokenStep | None) -> CudaTokenStep | None:
        """As `Steps.step`."""
        inner = model.model
        embedding, norm = inner.embed_tokens.weight, inner.norm
        weights = ModelWeights(embedding, norm.weight, norm.variance_epsilon, _head(model.lm_head, embedding.dtype))
        states = [(attention_state(layer._modules["self_attn"]), dense_state(layer)) for layer in inner.layers]
        if any(None in state for state in states):
            return None
        if last is not None and last.is_of(states, weights):
            return last
        sizes = _sizes(inner.layers[0], embedding)
        if any(_sizes(layer, embedding) != sizes for layer in inner.layers):
            say_once("layers use different numbers of experts: single tokens take transformers' code, which is slower")
            return None
        found = [self._layer(layer, embedding.dtype) for layer in inner.layers]
        layers = [layer for layer in found if layer is not None]
        if not weights.fit(embedding.dtype, self.device) or not fits(sizes) or len(layers) < len(found):
            return None
        return CudaTokenStep(*self._parts, sizes, layers, weights, states, *self._cpu)

    def _layer(self, layer: Any, dtype: torch.dtype) -> LayerParts | None:
        attention, experts, router = layer.self_attn, layer.mlp.experts, layer.mlp.gate
        norms = layer.input_layernorm, layer.post_attention_layernorm
        layout = experts.layout if type(experts) is CachedExperts else None
        first, second, routing = (_dense(module.weight, dtype, self.device) for module in (*norms, router))
        projections = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
        if layout is None or not layout.is_tiled or type(attention) is not PackedAttention or not is_mixtral(layer):
            return None
        if router.top_k > experts.cache.room(experts.layer):
            return None
        if first is None or second is None or routing is None:
            return None
        if not all(type(p) is PackedLinear and p.bias is None and p.packed.device == self.device for p in projections):
            return None
        packed = AttentionWeights(*(PackedMatrix(p.packed, p.packing.name, p.out_features) for p in projections))
        return packed, LayerWeights(first, second, routing, norms[0].variance_epsilon), layout


def _sizes(layer: Any, embedding: Tensor) -> Sizes:
    attention, router = layer.self_attn, layer.mlp.gate
    dim = attention.head_dim
    return Sizes(
        dtype=embedding.dtype,
        hidden=embedding.shape[1],
        heads=attention.q_proj.out_features // dim,
        kv_heads=attention.k_proj.out_features // dim,
        head_dim=dim,
        experts=router.weight.shape[0],
        top_k=router.top_k,
        scale=attention.scaling,
    )


def _dense(weight: Any, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    # Of other layouts the step would read a copy, which changes in place do not reach.
    if isinstance(weight, Tensor) and weight.dtype is dtype and weight.device == device and weight.is_contiguous():
        return weight.detach()
    return None


def _head(module: Any, dtype: torch.dtype) -> Tensor | PackedMatrix | None:
    """What the step takes of the output head; None where it stays a module."""
    if module._parameters.get("bias") is not None:
        return None
    if type(module) is PackedLinear:
        return PackedMatrix(module.packed, module.packing.name, module.out_features)
    if type(module) in (nn.Linear, NativeHead):
        return module.weight if module.weight.dtype is dtype is torch.bfloat16 else None
    return None
