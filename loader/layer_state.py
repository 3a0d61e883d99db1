"""Weights and settings of a layer, to be compared: while they are equal, a prepared step computes what the layer does.

Steps read weights where they lie, so a change in place needs no comparison. They keep the memory alive, so a new weight
lies elsewhere. Comparing the eight layers of the example model takes 12 µs of processor time a token.
"""

from typing import Any

from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm, MixtralSparseMoeBlock, MixtralTopKRouter

State = tuple[Any, ...]


def attention_state(attention: Any) -> State | None:
    """Addresses of the packed projections, and the settings; None if a projection is not packed, or has a bias."""
    modules = attention._modules
    q, k, v, o = modules["q_proj"], modules["k_proj"], modules["v_proj"], modules["o_proj"]
    try:
        if not (
            q._parameters.get("bias")
            is k._parameters.get("bias")
            is v._parameters.get("bias")
            is o._parameters.get("bias")
            is None
        ):
            return None
        return (
            q._buffers["packed"].data_ptr(),
            k._buffers["packed"].data_ptr(),
            v._buffers["packed"].data_ptr(),
            o._buffers["packed"].data_ptr(),
            attention.scaling,
            attention.head_dim,
        )
    except (AttributeError, KeyError):
        return None


def dense_state(layer: Any) -> State | None:
    """The same of a layer's norms and router; None if one has no weight of its own."""
    modules = layer._modules
    norm, experts_norm = modules["input_layernorm"], modules["post_attention_layernorm"]
    router = modules["mlp"]._modules["gate"]
    try:
        routing = router._parameters["weight"]
        return (
            norm._parameters["weight"].data_ptr(),
            experts_norm._parameters["weight"].data_ptr(),
            routing.data_ptr(),
            # Fewer experts may lie at the same address.
            routing.numel(),
            norm.variance_epsilon,
            experts_norm.variance_epsilon,
            router.top_k,
        )
    except (AttributeError, KeyError):
        return None


def is_mixtral(layer: Any) -> bool:
    """True if norms, router and block are transformers' own, the norms have one eps, and top_k is possible: what native
    steps compute."""
    norm, experts_norm, block = layer.input_layernorm, layer.post_attention_layernorm, layer.mlp
    return (
        type(norm) is type(experts_norm) is MixtralRMSNorm
        and type(block) is MixtralSparseMoeBlock
        and type(block.gate) is MixtralTopKRouter
        and norm.variance_epsilon == experts_norm.variance_epsilon
        and 1 <= block.gate.top_k <= len(block.gate.weight)
    )
