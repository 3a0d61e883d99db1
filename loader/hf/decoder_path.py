"""Computes one token of a transformers model with the decoder, if the model and call allow it."""

from collections import OrderedDict
from typing import Any

import torch
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from formats.files.log_once import warn_once
from loader.decode.decoder import Decoder, DecoderFactory
from loader.decode.decoder_call import TokenRequest, config_fields
from loader.decode.path_counters import LeaveDecoder, Reason
from loader.decode.rotary_table import RotaryTable
from loader.decode.specs import spec_of
from loader.hf.growing_cache import growing_layers
from loader.hf.listeners import Watch, check_no_adapter
from loader.hf.private_names import attention_implementation, cache_field, returns_attentions
from loader.lifetime.copies import Derived


class DecoderPath(Derived):
    """The decoder of one model.

    It is made for the first token, and again after a weight or setting has changed.
    docs/numerics.md ("One token through the decoder") lists the conditions for using it.
    """

    def __init__(self, model: Any, factory: DecoderFactory, kv_bits: int = 16) -> None:
        """kv_bits: 8 or 16, bits of a number in KV caches.

        Raises LeaveDecoder if the model has adapters, or modules that no decoder supports.
        """
        spec = self._spec = spec_of(model)
        check_no_adapter(model)
        spec.check_modules(model)
        self._model = model
        self._inner = model.model
        self._factory = factory
        self._kv_bits = kv_bits
        self._layers = len(model.model.layers)
        self._watch = Watch(model)
        self._experts = spec.experts_of(model)
        self._signature = spec.signature(model)
        self._made: tuple[list[Any], Decoder] | None = None
        self._rotary: RotaryTable | None = None
        self._blank_output = MoeCausalLMOutputWithPast()
        self._cache_field = cache_field()

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the output of the model's forward for these arguments.

        Raises LeaveDecoder if only transformers' code can compute it.
        """
        config = self._model.config
        request = TokenRequest.from_call(args, kwargs, config, self._layers, self._factory.device)
        if torch.is_grad_enabled():
            raise LeaveDecoder(Reason.GRADIENTS)
        self._check_surroundings(config)
        past = growing_layers(request.cache, self._layers, self._kv_bits)
        if past is None:
            raise LeaveDecoder(
                Reason.KV_CACHE, "a layer is not a DynamicLayer, or the lengths differ"
            )
        decoder = self._decoder()
        length = past[0].get_seq_length()
        token = request.token_after(length)
        embedding = self._inner.embed_tokens.weight
        if not 0 <= token < len(embedding):
            # transformers' code then raises torch's IndexError.
            raise LeaveDecoder(Reason.PROMPT)
        cosine_sine = self._rotary_of(embedding.dtype).find(length)
        result = decoder.run(token, *cosine_sine, past, self._experts)
        if config_fields(config).get("output_router_logits"):
            _say_router_logits_are_off()
        logits = result if decoder.has_head else self._model.lm_head(result)
        return self._output(logits, request.cache)

    def _check_surroundings(self, config: Any) -> None:
        if returns_attentions(config):
            raise LeaveDecoder(Reason.OUTPUTS, "output_attentions in the configuration")
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise LeaveDecoder(Reason.AUTOCAST)
        if (attention := attention_implementation(config)) != "sdpa":
            raise LeaveDecoder(Reason.ATTENTION, str(attention))
        if not self._spec.has_own_forward():
            raise LeaveDecoder(Reason.HOOKS, "the forward of transformers' class was replaced")
        self._watch.check()

    def _decoder(self) -> Decoder:
        """Return the decoder for the current weights."""
        try:
            now = self._signature.now()
        except (AttributeError, KeyError) as e:
            raise LeaveDecoder(Reason.REPLACED, f"a weight was removed: {e}") from None
        made = self._made
        if made is None or made[0] != now:
            made = (now, self._new_decoder())
            self._made = made
        return made[1]

    def _new_decoder(self) -> Decoder:
        weights = self._spec.read_weights(self._model, self._factory.device)
        for number, layer in enumerate(weights.layers):
            room = self._experts.room(number)
            if layer.top_k > room:
                raise LeaveDecoder(
                    Reason.EXPERTS,
                    f"layer {number} uses {layer.top_k} experts a token, the cache has room for"
                    f" {room}",
                )
        return self._factory.make(weights, self._experts)

    def _rotary_of(self, dtype: torch.dtype) -> RotaryTable:
        rotary = self._inner.rotary_emb
        table = self._rotary
        if not RotaryTable.fits(rotary):
            raise LeaveDecoder(Reason.ROTARY, f"rope_type {getattr(rotary, 'rope_type', None)}")
        if table is None or table.dtype is not dtype or not table.is_of(rotary):
            table = self._rotary = RotaryTable(rotary, dtype)
        return table

    def _output(self, logits: Any, cache: Any) -> Any:
        """Return MoeCausalLMOutputWithPast(logits=logits, cache=cache).

        Skips the checks of its constructor, which take 40 µs.
        """
        output = MoeCausalLMOutputWithPast.__new__(MoeCausalLMOutputWithPast)
        output.__dict__.update(self._blank_output.__dict__)
        for name, value in (("logits", logits), (self._cache_field, cache)):
            output.__dict__[name] = value
            OrderedDict.__setitem__(output, name, value)
        return output


def _say_router_logits_are_off() -> None:
    warn_once(
        "config.json sets output_router_logits, a training option: calls with a single token return"
        " no router logits; pass output_router_logits=True to the call to get them from"
        " transformers' slower code"
    )
