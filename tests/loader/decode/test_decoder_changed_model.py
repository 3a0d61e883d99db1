"""Weights and settings changed after the first token: later tokens use them, as in transformers."""

import pytest
import torch
from decoding import transformers_code
from torch import nn
from transformers import DynamicCache
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding, MixtralTopKRouter

import loader
from loader.arithmetic import kernels

pytestmark = pytest.mark.skipif(not kernels.available(), reason="not built")

IDS = torch.arange(7, 31)[None]


def logits(model):
    """Return the logits of single tokens after a prompt of twelve."""
    cache = DynamicCache()
    model(IDS[:, :12], past_key_values=cache, use_cache=True)
    return torch.cat(
        [model(i, past_key_values=cache, use_cache=True).logits for i in IDS[:, 12:].split(1, 1)], 1
    )


def logits_of_transformers(model):
    """Return the same from transformers' code over the same packed modules."""
    with transformers_code(model):
        return logits(model)


def other(weight):
    return nn.Parameter(
        weight.detach() * torch.linspace(0.2, 3, weight.shape[-1]), requires_grad=False
    )


def distance(a, b):
    return float((a - b).square().mean().sqrt() / b.std())


def routers(model):
    return [layer.mlp.gate for layer in model.model.layers[2:6]]


def replace_router_weight(model):
    for gate in routers(model):
        gate.weight = nn.Parameter(-gate.weight, requires_grad=False)


def assign_router_data(model):
    for gate in routers(model):
        gate.weight.data = -gate.weight.data


def change_router_in_place(model):
    for gate in routers(model):
        gate.weight.mul_(-1)


def change_router_of_another_layout_in_place(model):
    for gate in routers(model):
        gate.weight = nn.Parameter(gate.weight.t().contiguous().t(), requires_grad=False)
    logits(model)
    change_router_in_place(model)


def take_away_half_of_the_experts(model):
    for gate in routers(model):
        gate.weight.data = gate.weight.data[:4]


def replace_router(model):
    for layer in model.model.layers[2:6]:
        router = MixtralTopKRouter(model.config).eval()
        router.weight = nn.Parameter(-layer.mlp.gate.weight, requires_grad=False)
        layer.mlp.gate = router


def replace_attention_norm(model):
    for layer in model.model.layers:
        layer.input_layernorm.weight = other(layer.input_layernorm.weight)


def assign_experts_norm_data(model):
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight.data = other(
            layer.post_attention_layernorm.weight
        ).data


def replace_last_norm(model):
    model.model.norm.weight = other(model.model.norm.weight)


def assign_embedding_data(model):
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data.flip(0).contiguous()


def replace_head(model):
    model.lm_head.weight = other(model.lm_head.weight)


def give_the_head_a_bias(model):
    model.lm_head.bias = nn.Parameter(
        torch.linspace(-9, 9, model.config.vocab_size), requires_grad=False
    )


def exchange_q_buffers(model):
    one, other = (model.model.layers[n].self_attn.q_proj for n in (1, 0))
    one.packed = other.packed


def exchange_k_data(model):
    one, other = (model.model.layers[n].self_attn.k_proj for n in (1, 0))
    one.packed.data = other.packed.data.clone()


def exchange_v_in_place(model):
    one, other = (model.model.layers[n].self_attn.v_proj for n in (1, 0))
    one.packed.copy_(other.packed)


def exchange_o_modules(model):
    one, other = (model.model.layers[n].self_attn for n in (1, 0))
    one.o_proj = other.o_proj


def double_a_projection(model):
    class Doubled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    attention = model.model.layers[2].self_attn
    attention.v_proj = Doubled(attention.v_proj)


def change_scaling(model):
    for layer in model.model.layers:
        layer.self_attn.scaling *= 4


def change_eps_of_one_norm_of_each_layer(model):
    for layer in model.model.layers:
        layer.input_layernorm.variance_epsilon = 30.0


def change_eps_of_a_layer(model):
    layer = model.model.layers[1]
    layer.input_layernorm.variance_epsilon = layer.post_attention_layernorm.variance_epsilon = 300.0


def change_last_eps(model):
    model.model.norm.variance_epsilon = 3000.0


def use_three_experts(model):
    for layer in model.model.layers:
        layer.mlp.gate.top_k = 3


def use_one_expert_in_some_layers(model):
    for gate in routers(model):
        gate.top_k = 1


def use_all_experts_in_some_layers(model):
    for gate in routers(model):
        gate.top_k = 8


def replace_frequencies(model):
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 0.5


def change_frequencies_in_place(model):
    model.model.rotary_emb.inv_freq.data.mul_(0.5)


def scale_rotary(model):
    model.model.rotary_emb.attention_scaling = 1.5


def replace_rotary(model):
    config = type(model.config).from_dict(
        model.config.to_dict() | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    )
    model.model.rotary_emb = MixtralRotaryEmbedding(config).eval()


LAYER_CHANGES = [
    replace_router_weight,
    assign_router_data,
    change_router_in_place,
    change_router_of_another_layout_in_place,
    take_away_half_of_the_experts,
    replace_router,
    replace_attention_norm,
    assign_experts_norm_data,
    exchange_q_buffers,
    exchange_k_data,
    exchange_v_in_place,
    exchange_o_modules,
    double_a_projection,
    change_scaling,
    change_eps_of_one_norm_of_each_layer,
    change_eps_of_a_layer,
    use_three_experts,
    use_one_expert_in_some_layers,
    use_all_experts_in_some_layers,
]
MODEL_CHANGES = [
    replace_last_norm,
    change_last_eps,
    assign_embedding_data,
    replace_head,
    give_the_head_a_bias,
    replace_frequencies,
    change_frequencies_in_place,
    scale_rotary,
    replace_rotary,
]


def check(model, change):
    before = logits(model)
    change(model)
    after = logits(model)
    # int8 activations cause differences below 0.01 (tests/loader/decode/test_decoder.py).
    assert distance(after, logits_of_transformers(model)) < 0.02 < distance(after, before)


@torch.no_grad()
@pytest.mark.parametrize("change", LAYER_CHANGES + MODEL_CHANGES)
def test_the_next_token_uses_what_was_changed(converted, change):
    model = loader.from_pretrained(converted("2bit"), dtype=torch.float32, ram_cache="1GiB")
    check(model, change)


@torch.no_grad()
@pytest.mark.parametrize("change", LAYER_CHANGES)
def test_the_next_token_uses_what_was_changed_where_experts_come_and_go(converted, change):
    model = loader.from_pretrained(
        converted("2bit"), dtype=torch.float32, slots=[2, 0, 1, 2, 0, 1, 2, 2]
    )
    check(model, change)
