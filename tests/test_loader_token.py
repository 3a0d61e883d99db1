"""One token through the whole model in one native call: the bits of the layers' calls, and when it is left to them."""

import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

import loader
from converter.convert import convert_checkpoint
from converter.recipes import make_recipe
from loader import kernels
from loader.rotary_table import BLOCKS, POSITIONS, RotaryTable
from loader.token_forward import TokenForward
from loader.token_step import TokenStep

pytestmark = pytest.mark.skipif(not kernels.available(), reason="not built")

IDS = torch.arange(7, 47)[None]
NAME = "cache" if "cache" in MoeCausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(converted, request):
    return loader.from_pretrained(converted("2bit"), kernels="native", dtype=request.param, ram_cache="1GiB")


@pytest.fixture
def calls(monkeypatch):
    """Grows by one with each token that passes the whole model natively."""
    made, run = [], TokenStep.run

    def counted(self, *args):
        made.append(1)
        return run(self, *args)

    monkeypatch.setattr(TokenStep, "run", counted)
    return made


def token_by_token(model, cache=None, ids=IDS, **options):
    """Outputs of the second half of `ids`, one by one after a prompt of the first; of all, into a given cache."""
    parts = list(ids.split(1, 1))
    if cache is None:
        cache, half = DynamicCache(), ids.shape[1] // 2
        model(ids[:, :half], **{NAME: cache}, use_cache=True)
        parts = parts[half:]
    return [model(part, **{NAME: cache}, use_cache=True, **options) for part in parts]


def logits(steps):
    return torch.cat([step.logits for step in steps], 1)


def layer_by_layer(monkeypatch, run):
    with monkeypatch.context() as patch:
        patch.setattr(TokenForward, "__call__", lambda self, args, kwargs: None)
        return run()


@torch.no_grad()
def test_logits_and_caches_are_those_of_the_layers_calls(model, calls, monkeypatch):
    caches = DynamicCache(), DynamicCache()
    ours = token_by_token(model, caches[0], IDS.repeat(1, 8))
    assert len(calls) == 8 * IDS.shape[1] > 256
    plain = layer_by_layer(monkeypatch, lambda: token_by_token(model, caches[1], IDS.repeat(1, 8)))
    assert len(calls) == 8 * IDS.shape[1]
    assert torch.equal(logits(ours), logits(plain))
    assert ours[0].logits.dtype == model.dtype
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)


@torch.no_grad()
def test_the_output_is_the_object_that_transformers_makes(model, calls):
    cache = DynamicCache()
    (ours,) = token_by_token(model, cache, IDS[:, :1])
    assert calls
    plain = MoeCausalLMOutputWithPast(logits=ours.logits, **{NAME: cache})
    assert type(ours) is type(plain) and list(ours.items()) == list(plain.items())
    assert vars(ours) == vars(plain)
    assert ours[0] is ours.logits and ours.to_tuple() == (ours.logits, cache)


@torch.no_grad()
def test_experts_are_asked_for_as_by_the_layers(model, monkeypatch):
    counts = []
    for run in (lambda: token_by_token(model), lambda: layer_by_layer(monkeypatch, lambda: token_by_token(model))):
        model.reset_moe_stats()
        run()
        counts.append([layer.hits + layer.misses for layer in model.moe_stats().layers])
    assert counts[0] == counts[1]


@torch.no_grad()
@pytest.mark.parametrize("bits", [4, 16])
def test_a_packed_head_gives_the_layers_logits(example_folder, tmp_path, monkeypatch, calls, bits):
    convert_checkpoint(example_folder, tmp_path / "out", make_recipe("2bit", solver="hqq", head_bits=bits))
    for dtype in (torch.float32, torch.bfloat16):
        model = loader.from_pretrained(tmp_path / "out", kernels="native", dtype=dtype, ram_cache="1GiB")
        ours = token_by_token(model)
        assert len(calls) == IDS.shape[1] // 2
        assert torch.equal(logits(ours), logits(layer_by_layer(monkeypatch, lambda m=model: token_by_token(m))))
        calls.clear()


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [
        "model",
        "lm_head",
        "model.norm",
        "model.embed_tokens",
        "model.rotary_emb",
        "model.layers.1",
        "model.layers.0.mlp.gate",
    ],
)
def test_hooks_run(model, calls, name):
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda *_: seen.append(1))
    token_by_token(model)
    handle.remove()
    assert len(seen) == 1 + IDS.shape[1] // 2
    assert not calls
    token_by_token(model)
    assert len(calls) == IDS.shape[1] // 2


@torch.no_grad()
def test_hooks_of_the_model_itself_run_around_the_call(model, calls):
    seen = []
    handles = [
        model.register_forward_hook(lambda *_: seen.append(1)),
        model.register_forward_pre_hook(lambda *_: seen.append(0)),
    ]
    token_by_token(model)
    for handle in handles:
        handle.remove()
    assert len(calls) == IDS.shape[1] // 2
    assert seen == [0, 1] * (1 + len(calls))


class Doubled(nn.Module):
    """Another module's output, twice as large."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return 2 * self.inner(*args, **kwargs)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["lm_head", "model.norm", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj"]
)
def test_a_module_that_was_replaced_is_used(model, calls, name):
    before = logits(token_by_token(model))
    calls.clear()
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    inner = getattr(owner, child)
    setattr(owner, child, Doubled(inner))
    try:
        after = logits(token_by_token(model))
    finally:
        setattr(owner, child, inner)
    assert not calls
    assert not torch.equal(before, after)
    assert torch.equal(logits(token_by_token(model)), before)
    assert calls


@torch.no_grad()
def test_a_forward_that_was_replaced_is_called(model, calls, monkeypatch):
    for owner in (model.model, model.model.layers[0], model.lm_head):
        seen, inner = [], owner.forward
        with monkeypatch.context() as patch:
            patch.setattr(owner, "forward", lambda *args, s=seen, f=inner, **kwargs: s.append(1) or f(*args, **kwargs))
            token_by_token(model)
        assert len(seen) == 1 + IDS.shape[1] // 2
    assert not calls


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"output_router_logits": True},
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"return_dict": False},
        {"labels": torch.tensor([[5]])},
        {"logits_to_keep": torch.tensor([0])},
        {"position_ids": torch.tensor([[3]])},
        {"attention_mask": torch.tensor([[0, *[1] * 20]])},
        {"attention_mask": torch.zeros(1, 1, 1, 21)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_asks_for_more_than_logits_is_left_to_transformers(model, calls, options):
    cache = DynamicCache()
    model(IDS[:, :20], **{NAME: cache}, use_cache=True)
    output = model(IDS[:, 20:21], **{NAME: cache}, use_cache=True, **options)
    assert not calls
    if "output_router_logits" in options:
        assert len(output.router_logits) == len(model.model.layers)
    if options.get("return_dict") is False:
        assert isinstance(output, tuple)


@torch.no_grad()
@pytest.mark.parametrize(
    "setting", [{"output_router_logits": True}, {"output_hidden_states": True}, {"sliding_window": 8}]
)
def test_settings_of_the_configuration_are_left_to_transformers(model, calls, monkeypatch, setting):
    for name, value in setting.items():
        monkeypatch.setattr(model.config, name, value)
    token_by_token(model)
    assert not calls


@torch.no_grad()
def test_a_mask_of_ones_and_the_next_position_are_plain(model, calls, monkeypatch):
    def run():
        cache = DynamicCache()
        model(IDS[:, :20], **{NAME: cache}, use_cache=True)
        ones = torch.ones(1, 21, dtype=torch.int64)
        return model(
            input_ids=IDS[:, 20:21],
            attention_mask=ones,
            position_ids=torch.tensor([[20]]),
            **{NAME: cache},
            logits_to_keep=1,
        ).logits

    ours = run()
    assert len(calls) == 1
    assert torch.equal(ours, layer_by_layer(monkeypatch, run))


@torch.no_grad()
def test_batches_and_other_caches_are_left_to_transformers(model, calls):
    class Own(DynamicCache):
        """A cache with methods of its own, perhaps."""

    token_by_token(model, Own(), IDS[:, :2])
    two = DynamicCache()
    model(IDS[:, :4].repeat(2, 1), **{NAME: two}, use_cache=True)
    model(IDS[:, 4:5].repeat(2, 1), **{NAME: two}, use_cache=True)
    model(IDS[:, :1], use_cache=False)
    assert not calls


def test_with_gradients_transformers_code_runs(model, calls):
    token_by_token(model, DynamicCache(), IDS[:, :1])
    assert not calls


@torch.no_grad()
def test_training_mode_of_a_part_is_left_to_transformers(model, calls):
    model.model.layers[1].mlp.train()
    token_by_token(model)
    model.eval()
    assert not calls


@torch.no_grad()
def test_a_token_outside_of_the_vocabulary_raises_as_ever(model):
    cache = DynamicCache()
    with pytest.raises(IndexError):
        model(torch.tensor([[model.config.vocab_size]]), **{NAME: cache}, use_cache=True)


@torch.no_grad()
def test_copies_of_a_cache_go_separate_ways(model, calls):
    cache = DynamicCache()
    token_by_token(model, cache)
    other = copy.deepcopy(cache)
    tail = [token_by_token(model, cache), token_by_token(model, other)]
    assert len(calls) == 3 * IDS.shape[1]
    assert torch.equal(logits(tail[0]), logits(tail[1]))


@torch.no_grad()
def test_another_dtype_or_weight_after_loading_is_taken_up(converted, calls, monkeypatch):
    model = loader.from_pretrained(converted("2bit"), kernels="native", dtype=torch.bfloat16, ram_cache="1GiB")
    token_by_token(model)
    for change in (lambda: model.to(torch.float32), lambda: model.model.norm.weight.data.mul_(2.0), lambda: setattr(
        model.model.embed_tokens, "weight", nn.Parameter(model.model.embed_tokens.weight.flip(0)))):  # fmt: skip
        before = len(calls)
        change()
        ours = token_by_token(model)
        assert len(calls) == before + IDS.shape[1] // 2
        assert torch.equal(logits(ours), logits(layer_by_layer(monkeypatch, lambda: token_by_token(model))))


@torch.no_grad()
def test_with_room_for_some_experts_the_layers_ask(converted, calls):
    model = loader.from_pretrained(converted("2bit"), kernels="native", ram_cache=small_cache(converted("2bit")))
    assert max(model.moe_stats().slots) < 8
    token_by_token(model)
    assert not calls


def small_cache(folder):
    """Bytes that hold half of the experts."""
    whole = loader.from_pretrained(folder, kernels="native", ram_cache="1GiB").moe_stats()
    return whole.slot_bytes // 2


@torch.no_grad()
def test_an_expert_that_cannot_be_read_leaves_the_cache_as_it_was(converted, monkeypatch):
    model = loader.from_pretrained(converted("2bit"), kernels="native", ram_cache="1GiB")
    cache, source = DynamicCache(), model.model.layers[0].mlp.experts.cache
    model(IDS[:, :1], **{NAME: cache}, use_cache=True)

    def failing(method):
        def fails(self, layer, experts):
            if layer == len(model.model.layers) - 1:
                raise OSError("gone")
            return method(self, layer, experts)

        return fails

    with monkeypatch.context() as patch:
        for name in ("lease", "used_again"):
            patch.setattr(type(source), name, failing(getattr(type(source), name)))
        with pytest.raises(OSError, match="gone"):
            model(IDS[:, 1:2], **{NAME: cache}, use_cache=True)
    assert [layer.get_seq_length() for layer in cache.layers] == [1] * len(cache.layers)
    again = model(IDS[:, 1:2], **{NAME: cache}, use_cache=True).logits
    assert torch.equal(again[0, 0], logits(token_by_token(model, DynamicCache(), IDS[:, :2]))[0, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_rows_are_those_of_the_model(model, dtype):
    rotary = model.model.rotary_emb
    table = RotaryTable(rotary, dtype)
    for position in [*range(0, 2 * POSITIONS), 4097, 31999, *range(100000, 100000 + BLOCKS * POSITIONS, POSITIONS - 1)]:
        cos, sin, row = table.find(position)
        expected = rotary(torch.empty(1, dtype=dtype), torch.tensor([[position]]))
        assert torch.equal(cos[:, row], expected[0][:, 0]) and torch.equal(sin[:, row], expected[1][:, 0])


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}], ids=["greedy", "beams", "lookup"]
)
def test_generate_gives_the_tokens_of_the_layers_calls(model, monkeypatch, calls, options):
    def run():
        return model.generate(IDS, max_new_tokens=24, do_sample=False, pad_token_id=2, **options)

    ours = run()
    assert bool(calls) == ("num_beams" not in options)
    assert torch.equal(ours, layer_by_layer(monkeypatch, run))


def test_the_torch_backend_has_no_such_call(converted, calls):
    model = loader.from_pretrained(converted("2bit"), kernels="torch", ram_cache="1GiB")
    with torch.no_grad():
        token_by_token(model, DynamicCache(), IDS[:, :2])
    assert not calls
