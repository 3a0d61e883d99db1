"""The decoder layer: transformers' own, but that one token goes through two native calls.

With every weight of a layer read once a token, the processor's caches hold nothing else: some forty small operations
and a dozen module calls then cost 0.9 ms a layer (two cores, bfloat16), where the experts take 3.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

from loader.attention import PackedAttention
from loader.growing_cache import growing_layer
from loader.layer_state import State, dense_state, is_mixtral
from loader.layer_step import LayerStep, LayerWeights
from loader.listeners import Watch
from loader.modules import CachedExperts


class PackedDecoderLayer(MixtralDecoderLayer):  # type: ignore[misc]
    """MixtralDecoderLayer over packed weights.

    One token of one sequence, without a mask, into a plain DynamicCache, where nobody listens to the modules inside
    (loader/listeners.py): `LayerStep`. Everything else is
    transformers' code. The layer's own hooks run as always.
    """

    _step: tuple[State, LayerStep] | None = None
    """What the step was made of, and the step."""
    _watch: Watch | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As MixtralDecoderLayer.forward; hidden_states [batch, tokens, hidden]."""
        # Not by attribute: torch's Module searches three dicts in Python for each.
        attention: Any = self._modules["self_attn"]
        position_embeddings = kwargs.get("position_embeddings")
        if (
            hidden_states.shape[:2] == (1, 1)
            and type(attention) is PackedAttention
            and not args
            and position_embeddings is not None
            and kwargs.get("attention_mask") is None
            and attention.is_plain()
            and not self._is_heard()
        ):
            # 5.24 calls it cache, earlier versions past_key_values.
            past = growing_layer(kwargs.get("cache", kwargs.get("past_key_values")), attention.layer_idx)
            step = self.native_step(hidden_states.dtype) if past is not None else None
            if past is not None and step is not None:
                experts: Any = self._modules["mlp"]._modules["experts"]  # type: ignore[union-attr]
                cos, sin = position_embeddings
                return step.run(hidden_states, cos, sin, past, experts.layer, experts.cache)
        return super().forward(hidden_states, *args, **kwargs)

    def _is_heard(self) -> bool:
        if self._watch is None:
            self._watch = Watch(self)
        return self._watch.is_heard()

    def native_step(self, dtype: torch.dtype) -> LayerStep | None:
        """The step for activations of `dtype` and the present weights and settings, or None."""
        packed: Any = self._modules["self_attn"]
        attention = packed.native_step(dtype)
        if attention is None:
            return None
        state = dense_state(self)
        if self._step is not None:
            made_of, step = self._step
            # None in a deep copy of the model.
            if step is not None and step.attention is attention and made_of == state:
                return step
        experts, router = self.mlp.experts, self.mlp.gate
        layout = experts.layout if type(experts) is CachedExperts else None
        if state is None or layout is None or not layout.is_tiled or not is_mixtral(self):
            return None
        if router.top_k > experts.cache.room(experts.layer):
            return None
        norms = self.input_layernorm, self.post_attention_layernorm
        first, second, routing = (_dense(module, dtype) for module in (*norms, router))
        if first is None or second is None or routing is None:
            return None
        weights = LayerWeights(first, second, routing, norms[0].variance_epsilon)
        step = LayerStep(attention, weights, layout, router.top_k)
        self._step = state, step
        return step


def _dense(module: nn.Module, dtype: torch.dtype) -> Tensor | None:
    weight = module.weight
    # Of other layouts the step would read a copy, which changes in place do not reach.
    if isinstance(weight, Tensor) and weight.dtype is dtype and weight.device.type == "cpu" and weight.is_contiguous():
        return weight.detach()
    return None
