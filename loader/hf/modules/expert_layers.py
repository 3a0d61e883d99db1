"""The layers of a transformers model that have experts: their modules, their routers and the norms
before them.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from loader.hf.modules.packed_modules import CachedExperts


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module of each layer's experts, in the model's order: ours, or transformers' with all
    experts' weights in two parameters.
    """
    return {path: module for path, module in model.named_modules() if _holds_experts(module)}


@dataclass(frozen=True)
class RoutedLayer:
    """One layer's experts, and what comes before them: a router with `weight` [experts, hidden] and
    `top_k`, and the norm of its input.
    """

    experts: nn.Module
    router: Any
    norm: Any


def routed_layers(model: nn.Module) -> list[RoutedLayer] | None:
    """The layers that have experts; None where a router or norm is not where these model types have
    it: the router beside the experts as `gate`, the norm beside their block as
    `post_attention_layernorm`.
    """
    layers = []
    for path, experts in experts_modules(model).items():
        block_path = path.rpartition(".")[0]
        router = getattr(model.get_submodule(block_path), "gate", None)
        norm = getattr(
            model.get_submodule(block_path.rpartition(".")[0]), "post_attention_layernorm", None
        )
        if (
            getattr(getattr(router, "weight", None), "ndim", 0) != 2
            or getattr(norm, "weight", None) is None
        ):
            return None
        layers.append(RoutedLayer(experts, router, norm))
    return layers or None


def _holds_experts(module: nn.Module) -> bool:
    if isinstance(module, CachedExperts):
        return True
    fused = [module._parameters.get(name) for name in ("gate_up_proj", "down_proj")]
    return all(parameter is not None and parameter.ndim == 3 for parameter in fused)
