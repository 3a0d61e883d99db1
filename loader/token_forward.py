"""When one token goes through the whole model in one native call, and what then stands for transformers' forward."""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MixtralForCausalLM
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.mixtral.modeling_mixtral import MixtralModel

from loader.growing_cache import growing_layers
from loader.head import NativeHead
from loader.kernels import PackedMatrix
from loader.layer import PackedDecoderLayer
from loader.listeners import Watch
from loader.modules import CachedExperts, PackedLinear
from loader.norm import NativeNorm
from loader.rotary_table import RotaryTable
from loader.token_request import TokenRequest
from loader.token_step import ModelWeights, TokenStep

_FORWARDS = MixtralForCausalLM.forward, MixtralModel.forward
_CACHE_NAME = "cache" if "cache" in MoeCausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class TokenForward:
    """A model's forward for one token of one sequence, where nobody needs what lies between tokens and logits.

    docs/numerics.md ("One token through attention and a layer") says when; the results are those of the layers' calls,
    bit for bit.
    """

    _step: TokenStep | None = None
    _table: RotaryTable | None = None

    def __init__(self, model: Any) -> None:
        self._model, self._inner, self._watch = model, model.model, Watch(model)
        self._layers = list(model.model.layers)
        self._fits = _fits(model)
        self._experts = self._layers[0].mlp.experts.cache
        self._blank = MoeCausalLMOutputWithPast()

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What MixtralForCausalLM.forward gives for these arguments, or None where that must say it itself."""
        if not self._fits or torch.is_grad_enabled():
            return None
        request = TokenRequest.of(args, kwargs, self._model.config, len(self._layers))
        if request is None or not self._is_unheard():
            return None
        past = growing_layers(request.cache, len(self._layers))
        step = self._native_step() if past is not None else None
        if past is None or step is None or min(self._experts.slots) < step.experts:
            return None
        length = past[0].get_seq_length()
        token, follows = request.token_at(length)
        if not follows or not 0 <= token < step.vocabulary:
            return None
        result = step.run(token, *self._rotary(step.dtype).find(length), past, self._experts)
        return self._output(result if step.has_head else self._model.lm_head(result), request.cache)

    def _is_unheard(self) -> bool:
        return (
            type(self._model).forward is _FORWARDS[0]
            and MixtralModel.forward is _FORWARDS[1]
            and self._layers[0].self_attn.is_plain()
            and not self._watch.is_heard()
        )

    def _rotary(self, dtype: torch.dtype) -> RotaryTable:
        rotary, table = self._inner.rotary_emb, self._table
        if table is None or table.dtype is not dtype or not table.is_of(rotary):
            table = self._table = RotaryTable(rotary, dtype)
        return table

    def _native_step(self) -> TokenStep | None:
        """The step for the model's present weights, or None; made when first needed."""
        inner = self._inner
        embedding, norm, head = inner.embed_tokens.weight, inner.norm.weight, _head(self._model.lm_head)
        layers = [layer.native_step(embedding.dtype) for layer in self._layers]
        if None in layers:
            return None
        weights = ModelWeights(embedding, norm, inner.norm.variance_epsilon, head)
        step = self._step
        if step is None or not step.is_of(layers, weights):
            step = self._step = TokenStep(layers, weights) if weights.fit(layers[0].attention.dtype) else None
        return step

    def _output(self, logits: Tensor, cache: Any) -> Any:
        """MoeCausalLMOutputWithPast(logits=logits, cache=cache), without the 40 µs of its checks."""
        output = MoeCausalLMOutputWithPast.__new__(MoeCausalLMOutputWithPast)
        output.__dict__.update(self._blank.__dict__)
        for name, value in (("logits", logits), (_CACHE_NAME, cache)):
            output.__dict__[name] = value
            OrderedDict.__setitem__(output, name, value)
        return output


def one_token(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As `TokenForward.__call__`, of the model's own one, which is made when first needed."""
    if torch.compiler.is_compiling():
        return None
    forward = model.__dict__.get("_one_token")
    if forward is None:
        forward = model.__dict__["_one_token"] = TokenForward(model)
    return forward(args, kwargs)


def _fits(model: Any) -> bool:
    """Whether the modules are those that the native backend puts in, over one cache."""
    inner, layers = model.model, model.model.layers
    experts: list[Any] = [layer.mlp.experts for layer in layers]
    return (
        type(model) is MixtralForCausalLM
        and type(inner) is MixtralModel
        and type(inner.embed_tokens) is nn.Embedding
        and inner.embed_tokens.max_norm is None
        and type(inner.norm) is NativeNorm
        and RotaryTable.fits(inner.rotary_emb)
        and all(type(layer) is PackedDecoderLayer for layer in layers)
        and all(type(part) is CachedExperts and part.cache is experts[0].cache for part in experts)
        and [part.layer for part in experts] == list(range(len(layers)))
    )


def _head(module: nn.Module) -> Tensor | PackedMatrix | None:
    """What the native step takes of the output head; None where it stays a module."""
    if type(module) is PackedLinear and module.backend_name == "native":
        return PackedMatrix(module.packed, module.packing.name, module.out_features)
    if type(module) is NativeHead and module.weight.dtype is torch.bfloat16:
        return module.weight
    return None
