"""Counts the weights of a served model that torch does not know as parameters."""

from typing import Any

from loader.hf.modules.packed_modules import CachedExperts, PackedLinear


def packed_weights(model: Any) -> int:
    """Return the number of weights in the packed layers and in all experts, cached or not."""
    total = 0
    for module in model.modules():
        if isinstance(module, PackedLinear):
            total += module.out_features * module.in_features
        elif isinstance(module, CachedExperts):
            total += sum(layout.n_weights for layout in module.layouts.values())
    return total
