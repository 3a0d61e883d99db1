"""When one token goes through the whole model at once, and what then stands for transformers' forward."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import MixtralForCausalLM
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.mixtral.modeling_mixtral import MixtralModel

from loader.cache import ExpertSource
from loader.copies import Derived
from loader.growing_cache import GrowingLayer, growing_layers
from loader.listeners import Watch
from loader.modules import CachedExperts
from loader.native_steps import NativeSteps
from loader.rotary_table import RotaryTable
from loader.token_request import TokenRequest

_FORWARDS = MixtralForCausalLM.forward, MixtralModel.forward
_CACHE_NAME = "cache" if "cache" in MoeCausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class Step(Protocol):
    """One token's way through a whole model."""

    dtype: torch.dtype
    vocabulary: int
    has_head: bool

    def run(
        self, token: int, cos: Tensor, sin: Tensor, row: int, past: Sequence[GrowingLayer], experts: ExpertSource
    ) -> Tensor:
        """Logits [1, 1, rows] of the dtype; without `has_head`, what the head takes: [1, 1, hidden].

        cos and sin [1, positions, head_dim], of which `row` is the token's. `past`, one for each layer and all of one
        length, are one position longer then. Errors as `formats.reader.Load`; ValueError if a size is another."""


class Steps(Protocol):
    """A place where tokens go through models at once: the processor (`NativeSteps`), a GPU (loader/cuda).

    device: of the model, its inputs and its cache. norms, layers: what the last norm, and the layers, may be.
    """

    device: torch.device
    norms: tuple[type, ...]
    layers: tuple[type, ...]

    def step(self, model: Any, last: Any) -> Any:
        """The step for the present weights of `model`, where the modules are of the types above: `last`, if it is one
        of these, or None where there is none."""


class TokenForward(Derived):
    """A model's forward for one token of one sequence, where nobody needs what lies between tokens and logits.

    docs/numerics.md ("One token through attention and a layer") says when.
    """

    _step: Step | None = None
    _table: RotaryTable | None = None

    def __init__(self, model: Any, steps: Steps) -> None:
        self._model, self._inner, self._watch, self._steps = model, model.model, Watch(model), steps
        self._layers = list(model.model.layers)
        self._fits = _fits(model, steps)
        self._experts = self._layers[0].mlp.experts.cache
        self._blank = MoeCausalLMOutputWithPast()

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What MixtralForCausalLM.forward gives for these arguments, or None where that must say it itself."""
        if not self._fits or torch.is_grad_enabled():
            return None
        request = TokenRequest.of(args, kwargs, self._model.config, len(self._layers), self._steps.device)
        if request is None or not self._is_unheard():
            return None
        past = growing_layers(request.cache, len(self._layers))
        step = self._step = self._steps.step(self._model, self._step) if past is not None else None
        if past is None or step is None:
            return None
        if not RotaryTable.fits(self._inner.rotary_emb):
            return None
        length = past[0].get_seq_length()
        token = request.token_after(length)
        if token is None or not 0 <= token < step.vocabulary:
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

    def _output(self, logits: Tensor, cache: Any) -> Any:
        """MoeCausalLMOutputWithPast(logits=logits, cache=cache), without the 40 µs of its checks."""
        output = MoeCausalLMOutputWithPast.__new__(MoeCausalLMOutputWithPast)
        output.__dict__.update(self._blank.__dict__)
        for name, value in (("logits", logits), (_CACHE_NAME, cache)):
            output.__dict__[name] = value
            OrderedDict.__setitem__(output, name, value)
        return output


def one_token(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], steps: Callable[[], Steps] = NativeSteps
) -> Any:
    """As `TokenForward.__call__`, of the model's own one, which is made, with `steps`, when first needed."""
    if torch.compiler.is_compiling():
        return None
    forward = model.__dict__.get("_one_token")
    if forward is None:
        forward = model.__dict__["_one_token"] = TokenForward(model, steps())
    return forward(args, kwargs)


def _fits(model: Any, steps: Steps) -> bool:
    """Whether the modules are those that the plugin puts in, over one cache."""
    inner, layers = model.model, model.model.layers
    experts: list[Any] = [layer.mlp.experts for layer in layers]
    return (
        type(model) is MixtralForCausalLM
        and type(inner) is MixtralModel
        and type(inner.embed_tokens) is nn.Embedding
        and inner.embed_tokens.max_norm is None
        and type(inner.norm) in steps.norms
        and all(type(layer) in steps.layers for layer in layers)
        and all(type(part) is CachedExperts and part.cache is experts[0].cache for part in experts)
        and [part.layer for part in experts] == list(range(len(layers)))
    )
