"""Finds experts, routers and the norms before them in a transformers model."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from loader.hf.modules.packed_modules import CachedExperts


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return path -> module of each layer's experts, in the model's order.

    A module is a CachedExperts, or transformers' module with the weights of all experts in two
    parameters.
    """
    return {path: module for path, module in model.named_modules() if _holds_experts(module)}


@dataclass(frozen=True)
class RoutedLayer:
    """A layer's experts with the modules before them.

    router: has `weight` [experts, hidden] and `top_k`. norm: computes the router's input.
    """

    experts: nn.Module
    router: Any
    norm: Any


def routed_layers(model: nn.Module) -> list[RoutedLayer] | None:
    """Return the layers with experts, in the model's order.

    Expects the router as `gate` beside the experts, and the norm as `post_attention_layernorm`
    beside the block of both. Returns None if a layer lacks one, or if the model has no experts.
    """
    layers = []
    for path, experts in experts_modules(model).items():
        block_path = path.rpartition(".")[0]
        layer_path = block_path.rpartition(".")[0]
        router = getattr(model.get_submodule(block_path), "gate", None)
        norm = getattr(model.get_submodule(layer_path), "post_attention_layernorm", None)
        if getattr(getattr(router, "weight", None), "ndim", 0) != 2:
            return None
        if getattr(norm, "weight", None) is None:
            return None
        layers.append(RoutedLayer(experts, router, norm))
    return layers or None


def _holds_experts(module: nn.Module) -> bool:
    if isinstance(module, CachedExperts):
        return True
    fused = [module._parameters.get(name) for name in ("gate_up_proj", "down_proj")]
    return all(parameter is not None and parameter.ndim == 3 for parameter in fused)
