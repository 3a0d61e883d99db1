"""The attention module: transformers' own, but that one token goes through one native call."""

from typing import Any

import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import MixtralAttention

from loader.growing_cache import growing_layer
from loader.kernels import DTYPES, PackedMatrix
from loader.layer_state import State, attention_state
from loader.listeners import are_heard
from loader.modules import PackedLinear
from loader.step_kernels import AttentionStep, AttentionWeights

_MULTIPLE = 16
"""Head widths that the native step takes are multiples of it."""


class PackedAttention(MixtralAttention):  # type: ignore[misc]
    """MixtralAttention over packed weights.

    One token of one sequence, without a mask, into a plain DynamicCache: one native call (docs/numerics.md), where
    torch's attention takes 0.6 ms at 100 positions and 28 ms at 4000 (bfloat16, one core). Everything else is
    transformers' code, over a cache that grows in place.
    """

    _step: tuple[State, AttentionStep] | None = None
    """What the step was made of, and the step."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As MixtralAttention.forward; hidden_states [batch, tokens, hidden]."""
        # 5.24 calls it cache, earlier versions past_key_values.
        cache = args[0] if args else kwargs.get("cache", kwargs.get("past_key_values"))
        layer = growing_layer(cache, self.layer_idx)
        one = hidden_states.shape[:2] == (1, 1) and attention_mask is None
        if layer is not None and one and self.is_plain() and not are_heard(list(self.children())):
            step = self.native_step(hidden_states.dtype)
            if step is not None:
                return step.append(hidden_states, *position_embeddings, layer), None
        result: tuple[Tensor, Tensor | None] = super().forward(
            hidden_states, position_embeddings, attention_mask, *args, **kwargs
        )
        return result

    def is_plain(self) -> bool:
        """Whether nobody wants what the native step does not give: weights, dropout, gradients, another dtype."""
        return (
            not self.training
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not torch.is_autocast_enabled("cuda")
            and _implementation(self.config) == "sdpa"
        )

    def native_step(self, dtype: torch.dtype) -> AttentionStep | None:
        """The step for activations of `dtype` and the present weights and settings, or None."""
        state = attention_state(self)
        if self._step is not None:
            made_of, step = self._step
            # None in a deep copy of the model.
            if step is not None and step.dtype is dtype and made_of == state:
                return step
        projections = self.q_proj, self.k_proj, self.v_proj, self.o_proj
        if state is None or dtype not in DTYPES or self.head_dim % _MULTIPLE:
            return None
        if not all(type(p) is PackedLinear and p.backend_name == "native" and p.bias is None for p in projections):
            return None
        if not all(p.packed.device.type == "cpu" and p.packed.is_contiguous() for p in projections):
            return None
        weights = AttentionWeights(*(PackedMatrix(p.packed, p.packing.name, p.out_features) for p in projections))
        step = AttentionStep(weights, self.config.hidden_size, self.head_dim, self.scaling, dtype)
        self._step = state, step
        return step


def _implementation(config: Any) -> Any:
    """config._attn_implementation, without the Python that its property runs through (5 µs)."""
    try:
        return object.__getattribute__(config, "_attn_implementation_internal")
    except AttributeError:
        return config._attn_implementation
