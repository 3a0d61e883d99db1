"""NaN on one token's native way through a layer: it comes out as NaN, and the router still names existing experts."""

import math

import pytest
import torch
from transformers import DynamicCache

import loader
from loader import kernels
from loader.layer_step import LayerStep
from loader.token_forward import TokenForward

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
def steps(monkeypatch):
    """Of each native step: the experts asked for, and the output."""
    made, run = [], LayerStep.run

    class Asked:
        def __init__(self, experts):
            self.experts = experts

        def lease(self, layer, wanted):
            self.wanted = wanted
            return self.experts.lease(layer, wanted)

        def router_ahead(self, layer):
            return None

    def recorded(self, *args):
        *rest, experts = args
        asked = Asked(experts)
        out = run(self, *rest, asked)
        made.append((asked.wanted, out))
        return out

    monkeypatch.setattr(LayerStep, "run", recorded)
    return made


SPOILERS = [spoil_input, spoil_input_with_infinity, spoil_one_expert_of_the_router, spoil_the_router, spoil_a_norm]


@torch.no_grad()
def spoiled_logits(folder, spoil, dtype):
    """Of one token after a prompt, something in the first layer having been spoiled in between; and the model."""
    model = loader.from_pretrained(folder, kernels="native", dtype=dtype)
    cache = DynamicCache()
    model(PROMPT, past_key_values=cache, use_cache=True)
    spoil(model.model.layers[0], model)
    return model(TOKEN, past_key_values=cache, use_cache=True).logits, model


@pytest.mark.parametrize("isa", kernels.supported_isas() if kernels.available() else [])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("spoil", SPOILERS)
def test_nan_comes_out_as_nan_and_names_existing_experts(converted, steps, spoil, dtype, isa, monkeypatch):
    monkeypatch.setattr(TokenForward, "__call__", lambda self, args, kwargs: None)
    kernels.set_isa(isa)
    try:
        logits, model = spoiled_logits(converted("2bit"), spoil, dtype)
    finally:
        kernels.set_isa("auto")
    assert len(steps) == len(model.model.layers)
    for wanted, out in steps:
        assert out.isnan().all()
        assert len(set(wanted)) == 2
        assert set(wanted) <= set(range(8))
    assert logits.isnan().all()


@pytest.mark.parametrize("spoil", SPOILERS)
def test_nan_comes_out_of_the_call_for_a_whole_token(converted, steps, spoil):
    logits, _ = spoiled_logits(converted("2bit"), spoil, torch.float32)
    assert not steps
    assert logits.isnan().all()
