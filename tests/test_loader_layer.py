"""One token through a layer in two native calls: what transformers' code gives, and when it is left to that."""

import copy

import pytest
import torch
from transformers import DynamicCache

import loader
from loader import kernels
from loader.attention import PackedAttention
from loader.layer import PackedDecoderLayer
from loader.layer_step import LayerStep
from loader.token_forward import TokenForward

pytestmark = pytest.mark.skipif(not kernels.available(), reason="not built")

IDS = torch.arange(7, 47)[None]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(converted, request):
    return loader.from_pretrained(converted("2bit"), kernels="native", dtype=request.param)


@pytest.fixture(autouse=True)
def layers_one_by_one(monkeypatch):
    """No native call for a whole token (test_loader_token.py)."""
    monkeypatch.setattr(TokenForward, "__call__", lambda self, args, kwargs: None)


@pytest.fixture
def calls(monkeypatch):
    """Grows by one with each layer that one token passes natively."""
    made, run = [], LayerStep.run

    def counted(self, *args):
        made.append(1)
        return run(self, *args)

    monkeypatch.setattr(LayerStep, "run", counted)
    return made


def token_by_token(model, begin=20, cache=None, **options):
    """Logits of the tokens from `begin` on, one at a time after a prompt, without autograd."""
    cache, steps = DynamicCache() if cache is None else cache, []
    for part in [IDS[:, :begin], *IDS[:, begin:].split(1, 1)] if cache.get_seq_length() == 0 else IDS.split(1, 1):
        steps.append(model(part, past_key_values=cache, use_cache=True, **options))
    return steps


def logits(steps):
    return torch.cat([step.logits for step in steps], 1).float()


@torch.no_grad()
def test_logits_differ_from_transformers_code_by_rounding_only(model, calls, monkeypatch):
    native = logits(token_by_token(model))
    assert len(calls) == 20 * len(model.model.layers)
    monkeypatch.setattr(PackedAttention, "is_plain", lambda self: False)
    plain = logits(token_by_token(model))
    assert len(calls) == 20 * len(model.model.layers)
    # Rounding of q, k, v, o's inputs to int8 turns on their last bits; bfloat16 has 8 of them.
    difference = (native - plain).square().mean().sqrt() / plain.std()
    assert difference < (1e-2 if model.dtype == torch.float32 else 5e-2)


@torch.no_grad()
def test_experts_are_asked_for_as_by_transformers_code(model, monkeypatch):
    model.reset_moe_stats()
    token_by_token(model)
    native = [layer.hits + layer.misses for layer in model.moe_stats().layers]
    model.reset_moe_stats()
    monkeypatch.setattr(PackedAttention, "is_plain", lambda self: False)
    token_by_token(model)
    assert native == [layer.hits + layer.misses for layer in model.moe_stats().layers]


@torch.no_grad()
def test_router_logits_are_given_where_they_are_asked_for(model):
    for step in token_by_token(model, output_router_logits=True)[1:]:
        assert len(step.router_logits) == len(model.model.layers)
        assert all(part.shape == (1, 8) for part in step.router_logits)


@torch.no_grad()
def test_after_recorded_outputs_native_calls_go_on(model, calls):
    token_by_token(model, output_router_logits=True, output_hidden_states=True)
    assert not calls
    token_by_token(model)
    assert len(calls) == 20 * len(model.model.layers)


@torch.no_grad()
def test_hidden_states_are_given_where_they_are_asked_for(model):
    for step in token_by_token(model, output_hidden_states=True)[1:]:
        assert len(step.hidden_states) == len(model.model.layers) + 1


@torch.no_grad()
@pytest.mark.parametrize("name", ["self_attn", "mlp.gate", "input_layernorm", "self_attn.q_proj", "mlp.experts"])
def test_hooks_on_modules_inside_run(model, calls, name):
    token_by_token(model)
    before, seen = len(calls), []
    module = model.model.layers[0].get_submodule(name)
    handle = module.register_forward_hook(lambda *args: seen.append(1))
    token_by_token(model)
    handle.remove()
    assert len(seen) == 21
    assert len(calls) == before + 20 * (len(model.model.layers) - 1)
    token_by_token(model)
    assert len(calls) == before + 20 * (2 * len(model.model.layers) - 1)


def test_with_gradients_transformers_code_runs(model, calls):
    cache = DynamicCache()
    model(IDS[:, :1], past_key_values=cache, use_cache=True)
    assert not calls


@torch.no_grad()
def test_copies_of_a_cache_go_separate_ways(model):
    cache = DynamicCache()
    token_by_token(model, cache=cache)
    other = copy.deepcopy(cache)
    tail = [token_by_token(model, cache=cache), token_by_token(model, cache=other)]
    assert torch.equal(logits(tail[0]), logits(tail[1]))
    assert torch.equal(cache.layers[0].keys, other.layers[0].keys)
    assert cache.layers[0].keys.data_ptr() != other.layers[0].keys.data_ptr()


@torch.no_grad()
def test_more_tokens_than_the_memory_first_held(model, calls):
    cache = DynamicCache()
    for _ in range(8):
        token_by_token(model, cache=cache)
    assert cache.get_seq_length() == 8 * IDS.shape[1] > 256


@torch.no_grad()
def test_another_dtype_after_loading_is_taken_up(converted):
    model = loader.from_pretrained(converted("2bit"), kernels="native", dtype=torch.bfloat16)
    token_by_token(model)
    model.to(torch.float32)
    other = loader.from_pretrained(converted("2bit"), kernels="native", dtype=torch.bfloat16).to(torch.float32)
    assert torch.equal(logits(token_by_token(model)), logits(token_by_token(other)))


def test_the_torch_backend_keeps_transformers_layers(converted):
    model = loader.from_pretrained(converted("2bit"), kernels="torch")
    assert not any(isinstance(module, PackedDecoderLayer) for module in model.modules())
