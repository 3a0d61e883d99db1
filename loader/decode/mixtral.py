"""The spec of Mixtral: the modules that a decoder replaces, their weights and settings."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import (
    MixtralAttention,
    MixtralDecoderLayer,
    MixtralModel,
    MixtralRMSNorm,
    MixtralSparseMoeBlock,
    MixtralTopKRouter,
)

from loader.arithmetic.kernels import PackedMatrix
from loader.decode.path_counters import LeaveDecoder, Reason
from loader.decode.weights import AttentionWeights, LayerWeights, ModelWeights, Signature
from loader.experts.cache import ExpertSource
from loader.hf.modules.head import NativeHead
from loader.hf.modules.packed_modules import CachedExperts, PackedLinear

_FORWARD = MixtralModel.forward
_ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def check_modules(model: Any) -> None:
    """Raise LeaveDecoder unless `model` is a Mixtral with unchanged modules over one cache."""
    _expect(isinstance(model, MixtralForCausalLM), Reason.FAMILY, type(model).__name__)
    inner = model.model
    embedding = inner.embed_tokens
    _expect(type(inner) is MixtralModel, Reason.REPLACED, "model")
    _expect(
        type(embedding) is nn.Embedding and embedding.max_norm is None,
        Reason.REPLACED,
        "model.embed_tokens",
    )
    _expect(type(inner.norm) is MixtralRMSNorm, Reason.REPLACED, "model.norm")
    for number, layer in enumerate(inner.layers):
        name = f"model.layers.{number}"
        _expect(type(layer) is MixtralDecoderLayer, Reason.REPLACED, name)
        _expect(type(layer.self_attn) is MixtralAttention, Reason.REPLACED, f"{name}.self_attn")
        for norm in ("input_layernorm", "post_attention_layernorm"):
            _expect(type(getattr(layer, norm)) is MixtralRMSNorm, Reason.REPLACED, f"{name}.{norm}")
        block = layer.mlp
        _expect(type(block) is MixtralSparseMoeBlock, Reason.REPLACED, f"{name}.mlp")
        _expect(type(block.gate) is MixtralTopKRouter, Reason.REPLACED, f"{name}.mlp.gate")
        experts = block.experts
        is_ours = type(experts) is CachedExperts and experts.layer == number
        _expect(
            is_ours and experts.cache is experts_of(model), Reason.REPLACED, f"{name}.mlp.experts"
        )


def has_own_forward() -> bool:
    """True if the forward of transformers' class was not replaced."""
    return MixtralModel.forward is _FORWARD


def experts_of(model: Any) -> ExpertSource:
    """Return the cache of the first layer's experts."""
    source: ExpertSource = model.model.layers[0].mlp.experts.cache
    return source


def signature(model: Any) -> Signature:
    """Return the signature of the weights and settings that `read_weights` reads."""
    values = Signature()
    inner = model.model
    _add_weight(values, inner.embed_tokens)
    _add_norm(values, inner.norm)
    if type(model.lm_head) is PackedLinear:
        values.add_tensor(model.lm_head._buffers, "packed")
    else:
        values.add_tensor(model.lm_head._parameters, "weight")
    values.add_absent(model.lm_head._parameters, "bias")
    for layer in inner.layers:
        attention = layer.self_attn
        for name in _ATTENTION_PROJECTIONS:
            projection = getattr(attention, name)
            values.add_tensor(*_matrix_place(projection))
            values.add_absent(projection._parameters, "bias")
        values.add_setting(attention.__dict__, "scaling")
        values.add_setting(attention.__dict__, "head_dim")
        _add_norm(values, layer.input_layernorm)
        _add_norm(values, layer.post_attention_layernorm)
        _add_weight(values, layer.mlp.gate)
        values.add_setting(layer.mlp.gate.__dict__, "top_k")
    return values


def read_weights(model: Any, device: torch.device) -> ModelWeights:
    """Return the present weights of a model that passed `check_modules`.

    Raises LeaveDecoder naming the first module that is not packed, not contiguous, not on `device`,
    or of another dtype.
    """
    inner = model.model
    dtype = inner.embed_tokens.weight.dtype
    return ModelWeights(
        layers=tuple(
            _layer(layer, f"model.layers.{number}", dtype, device)
            for number, layer in enumerate(inner.layers)
        ),
        embedding=_dense(inner.embed_tokens, "model.embed_tokens", dtype, device),
        norm=_dense(inner.norm, "model.norm", dtype, device),
        eps=inner.norm.variance_epsilon,
        head=_head(model.lm_head, dtype, device),
    )


def _layer(layer: Any, name: str, dtype: torch.dtype, device: torch.device) -> LayerWeights:
    attention, router = layer.self_attn, layer.mlp.gate
    norm, experts_norm = layer.input_layernorm, layer.post_attention_layernorm
    routing = _dense(router, f"{name}.mlp.gate", dtype, device)
    if not 1 <= router.top_k <= len(routing):
        raise LeaveDecoder(
            Reason.EXPERTS, f"{name}.mlp.gate: top_k {router.top_k} of {len(routing)}"
        )
    projections = [
        _packed(attention, projection, f"{name}.self_attn", device)
        for projection in _ATTENTION_PROJECTIONS
    ]
    return LayerWeights(
        attention=AttentionWeights(*projections),
        head_dim=attention.head_dim,
        scale=attention.scaling,
        attention_norm=_dense(norm, f"{name}.input_layernorm", dtype, device),
        attention_eps=norm.variance_epsilon,
        experts_norm=_dense(experts_norm, f"{name}.post_attention_layernorm", dtype, device),
        experts_eps=experts_norm.variance_epsilon,
        router=routing,
        top_k=router.top_k,
        layouts=layer.mlp.experts.layouts,
    )


def _packed(attention: Any, projection: str, name: str, device: torch.device) -> PackedMatrix:
    module = getattr(attention, projection)
    name = f"{name}.{projection}"
    if type(module) is not PackedLinear:
        raise LeaveDecoder(Reason.WEIGHTS, f"{name} is not packed")
    if (
        module.bias is not None
        or module.packed.device != device
        or not module.packed.is_contiguous()
    ):
        raise LeaveDecoder(Reason.WEIGHTS, f"{name} has a bias, or is not contiguous on {device}")
    return PackedMatrix(module.packed, module.packing.name, module.out_features)


def _dense(module: Any, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    weight = module.weight
    # The decoder would need a copy of other layouts, and a copy misses changes in place.
    if weight.dtype is not dtype or weight.device != device or not weight.is_contiguous():
        raise LeaveDecoder(Reason.WEIGHTS, f"{name} is not contiguous {dtype} on {device}")
    detached: Tensor = weight.detach()
    return detached


def _head(module: Any, dtype: torch.dtype, device: torch.device) -> Tensor | PackedMatrix | None:
    """Return the head's weight for the decoder; None if torch computes the head."""
    if module._parameters.get("bias") is not None:
        return None
    if type(module) is PackedLinear:
        is_here = module.packed.device == device and module.packed.is_contiguous()
        return (
            PackedMatrix(module.packed, module.packing.name, module.out_features)
            if is_here
            else None
        )
    if type(module) in (nn.Linear, NativeHead):
        weight: Tensor = module.weight
        is_here = weight.device == device and weight.is_contiguous()
        return weight.detach() if is_here and weight.dtype is dtype is torch.bfloat16 else None
    return None


def _matrix_place(projection: Any) -> tuple[Any, str]:
    if type(projection) is PackedLinear:
        return projection._buffers, "packed"
    return projection._parameters, "weight"


def _add_weight(values: Signature, module: Any) -> None:
    values.add_tensor(module._parameters, "weight")


def _add_norm(values: Signature, module: Any) -> None:
    _add_weight(values, module)
    values.add_setting(module.__dict__, "variance_epsilon")


def _expect(holds: bool, reason: Reason, name: str) -> None:
    if not holds:
        raise LeaveDecoder(reason, name)
