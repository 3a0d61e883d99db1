"""NaN in one token's pass through the decoder: the logits are NaN, and the router still chooses
existing experts.
"""

import math

import pytest
import torch
from transformers import DynamicCache

import loader
from loader.arithmetic import kernels
from loader.experts.cache import ExpertCache

pytestmark = pytest.mark.skipif(not kernels.available(), reason="not built")

PROMPT, TOKEN = torch.arange(7, 12)[None], torch.tensor([[40]])


def spoil_input(layer, model):
    model.model.embed_tokens.weight[TOKEN, 3] = math.nan


def spoil_input_with_infinity(layer, model):
    model.model.embed_tokens.weight[TOKEN, 3] = math.inf


def spoil_one_expert_of_the_router(layer, model):
    layer.mlp.gate.weight[5, 2] = math.nan  # the other seven logits are numbers


def spoil_the_router(layer, model):
    layer.mlp.gate.weight[:] = math.nan


def spoil_a_norm(layer, model):
    layer.post_attention_layernorm.weight[1] = math.nan


@pytest.fixture
def asked(monkeypatch):
    """The experts of each lease."""
    made, lease = [], ExpertCache.lease

    def recorded(self, layer, experts):
        made.append(experts)
        return lease(self, layer, experts)

    monkeypatch.setattr(ExpertCache, "lease", recorded)
    return made


SPOILERS = [
    spoil_input,
    spoil_input_with_infinity,
    spoil_one_expert_of_the_router,
    spoil_the_router,
    spoil_a_norm,
]


@torch.no_grad()
def spoiled_logits(folder, spoil, dtype, asked, **options):
    """Spoil the first layer after a prompt. Return the logits of the next token, and the model."""
    model = loader.from_pretrained(folder, kernels="native", dtype=dtype, **options)
    cache = DynamicCache()
    model(PROMPT, past_key_values=cache, use_cache=True)
    spoil(model.model.layers[0], model)
    asked.clear()
    logits = model(TOKEN, past_key_values=cache, use_cache=True).logits
    assert model.moe_stats().paths.decoder == 1
    return logits, model


@pytest.mark.parametrize("isa", kernels.supported_isas() if kernels.available() else [])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("spoil", SPOILERS)
def test_nan_comes_out_as_nan_and_names_existing_experts(converted, asked, spoil, dtype, isa):
    kernels.set_isa(isa)
    try:
        logits, model = spoiled_logits(converted("2bit"), spoil, dtype, asked, slots=[4] * 8)
    finally:
        kernels.set_isa("auto")
    assert len(asked) == len(model.model.layers)
    for experts in asked:
        assert len(set(experts)) == 2
        assert set(experts) <= set(range(8))
    assert logits.isnan().all()


@pytest.mark.parametrize("spoil", SPOILERS)
def test_nan_comes_out_where_all_experts_are_in_memory(converted, asked, spoil):
    logits, _ = spoiled_logits(converted("2bit"), spoil, torch.float32, asked, ram_cache="1GiB")
    assert logits.isnan().all()
