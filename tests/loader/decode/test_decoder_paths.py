"""The path that computes a token, and the reason in the counters and the log."""

import logging

import pytest
import torch
from decoding import IDS, NAME, logits, paths, prompted, token_by_token
from torch import nn
from transformers import DynamicCache, StaticCache

import loader
from loader.arithmetic import kernels
from loader.decode import mixtral
from loader.hf import listeners

pytestmark = pytest.mark.skipif(not kernels.available(), reason="not built")

TOKENS = IDS.shape[1] // 2


@pytest.fixture(scope="module")
def model(converted):
    return loader.from_pretrained(converted("2bit"), kernels="native", ram_cache="1GiB")


@pytest.fixture
def fresh(converted):
    return loader.from_pretrained(converted("2bit"), kernels="native", ram_cache="1GiB")


@torch.no_grad()
@pytest.mark.parametrize("slots", [None, [2, 0, 1, 8, 4, 1, 2, 3]])
def test_single_tokens_take_the_decoder_and_prompts_do_not(converted, slots):
    model = loader.from_pretrained(converted("2bit"), kernels="native", slots=slots)
    token_by_token(model)
    stats = model.moe_stats()
    assert stats.paths.decoder == TOKENS and stats.paths.decoder_experts == 0
    assert stats.paths.transformers == TOKENS and stats.paths.reasons == {"prompt": TOKENS}
    assert stats.as_dict()["tokens"]["reasons"] == {"prompt": TOKENS}
    model.reset_moe_stats()
    assert model.moe_stats().paths.decoder == 0 and not model.moe_stats().paths.reasons


@torch.no_grad()
def test_prompts_and_batches_are_never_logged(fresh, caplog):
    with caplog.at_level(logging.DEBUG, logger="loader.decode"):
        cache = DynamicCache()
        fresh(IDS[:, :4].repeat(2, 1), **{NAME: cache}, use_cache=True)
        fresh(IDS[:, 4:5].repeat(2, 1), **{NAME: cache}, use_cache=True)
        fresh(IDS[:, :1], use_cache=False)
        fresh(inputs_embeds=fresh.model.embed_tokens(IDS))
    assert fresh.moe_stats().paths.reasons == {"prompt": 8 + 2 + 1 + IDS.shape[1]}
    assert not caplog.messages


def left(model, run):
    """Return the reasons why no token of `run` takes the decoder; later tokens take it again."""
    decoded, reasons = paths(model, run)
    assert decoded == 0
    assert paths(model, lambda: token_by_token(model)) == (TOKENS, {})
    return reasons


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [
        "lm_head",
        "model",
        "model.norm",
        "model.embed_tokens",
        "model.rotary_emb",
        "model.layers.1",
        "model.layers.0.mlp.gate",
        "model.layers.0.self_attn",
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.experts",
    ],
)
def test_hooks_run(model, name):
    def run():
        handle = model.get_submodule(name).register_forward_hook(lambda *_: seen.append(1))
        token_by_token(model)
        handle.remove()

    seen = []
    assert left(model, run) == {"hooks": TOKENS}
    assert len(seen) == 1 + TOKENS


@torch.no_grad()
def test_hooks_of_the_model_itself_run_around_the_decoder(model):
    seen = []
    handles = [
        model.register_forward_hook(lambda *_: seen.append(1)),
        model.register_forward_pre_hook(lambda *_: seen.append(0)),
    ]
    assert paths(model, lambda: token_by_token(model)) == (TOKENS, {})
    for handle in handles:
        handle.remove()
    assert seen == [0, 1] * (1 + TOKENS)


@torch.no_grad()
def test_global_hooks_of_torch_run(model):
    def run():
        handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
        token_by_token(model)
        handle.remove()

    seen = []
    assert left(model, run) == {"hooks": TOKENS}
    assert seen


class Doubled(nn.Module):
    """Another module's output, twice as large."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return 2 * self.inner(*args, **kwargs)


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    ["lm_head", "model.norm", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj"],
)
def test_a_module_that_was_replaced_is_used(model, name):
    def run():
        setattr(owner, child, Doubled(inner))
        after.append(logits(token_by_token(model)))
        setattr(owner, child, inner)

    before, after = logits(token_by_token(model)), []
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    inner = getattr(owner, child)
    assert left(model, run) == {"replaced module": TOKENS}
    assert not torch.equal(before, after[0])
    assert torch.equal(logits(token_by_token(model)), before)


@torch.no_grad()
def test_a_forward_that_was_replaced_is_called(model, monkeypatch):
    for owner in (model.model, model.model.layers[0], model.lm_head):
        seen, inner = [], owner.forward

        def run(seen=seen, inner=inner, owner=owner):
            with monkeypatch.context() as patch:
                patch.setattr(
                    owner,
                    "forward",
                    lambda *args, **kwargs: seen.append(1) or inner(*args, **kwargs),
                )
                token_by_token(model)

        assert left(model, run) == {"hooks": TOKENS}
        assert len(seen) == 1 + TOKENS


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"output_router_logits": True}, "other outputs"),
        ({"output_hidden_states": True}, "other outputs"),
        ({"output_attentions": True}, "other outputs"),
        ({"return_dict": False}, "other outputs"),
        ({"labels": torch.tensor([[5]])}, "other outputs"),
        ({"logits_to_keep": torch.tensor([0])}, "other outputs"),
        ({"position_ids": torch.tensor([[3]])}, "mask or positions"),
        ({"attention_mask": torch.tensor([[0, *[1] * 20]])}, "mask or positions"),
        ({"attention_mask": torch.zeros(1, 1, 1, 21)}, "mask or positions"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_calls_for_more_than_logits_are_left_to_transformers(model, options, reason):
    def run():
        cache = prompted(model, IDS[:, :20])
        found.append(model(IDS[:, 20:21], **{NAME: cache}, use_cache=True, **options))

    found = []
    assert left(model, run) == {reason: 1}
    if "output_router_logits" in options:
        assert len(found[0].router_logits) == len(model.model.layers)
        assert all(part.shape == (1, 8) for part in found[0].router_logits)
    if "output_hidden_states" in options:
        assert len(found[0].hidden_states) == len(model.model.layers) + 1
    if options.get("return_dict") is False:
        assert isinstance(found[0], tuple)


@torch.no_grad()
@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"output_hidden_states": True}, "other outputs"),
        ({"sliding_window": 8}, "sliding window"),
        ({"_attn_implementation": "eager"}, "attention implementation"),
    ],
)
def test_settings_of_the_configuration_are_left_to_transformers(model, setting, reason):
    def run():
        ((name, value),) = setting.items()
        before = getattr(model.config, name)
        setattr(model.config, name, value)
        token_by_token(model)
        setattr(model.config, name, before)

    assert left(model, run) == {reason: TOKENS}


@torch.no_grad()
def test_a_configuration_for_training_decodes_at_full_speed_and_says_so_once(fresh, caplog):
    expected = logits(token_by_token(fresh))
    fresh.config.output_router_logits = True
    found = []
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert paths(fresh, lambda: found.append(token_by_token(fresh))) == (TOKENS, {})
    assert torch.equal(logits(found[1]), expected)
    assert found[1][0].router_logits is None
    assert len([message for message in caplog.messages if "output_router_logits" in message]) <= 1
    token = fresh(
        IDS[:, 20:21],
        **{NAME: prompted(fresh, IDS[:, :20])},
        use_cache=True,
        output_router_logits=True,
    )
    assert len(token.router_logits) == len(fresh.model.layers)


@torch.no_grad()
def test_other_caches_are_left_to_transformers(model):
    class Own(DynamicCache):
        """A cache that may have its own methods."""

    static = StaticCache(config=model.config, max_cache_len=64)
    assert left(model, lambda: token_by_token(model, Own(), IDS[:, :2])) == {"kv cache": 2}
    assert left(model, lambda: token_by_token(model, static, IDS[:, :2])) == {"kv cache": 2}


@torch.no_grad()
def test_beams_are_batches(model):
    def run():
        model.generate(IDS, max_new_tokens=4, num_beams=2, do_sample=False, pad_token_id=2)

    assert left(model, run) == {}


def test_with_gradients_transformers_code_runs(model):
    def run():
        token_by_token(model, DynamicCache(), IDS[:, :1])

    with torch.enable_grad():
        decoded, reasons = paths(model, run)
    assert (decoded, reasons) == (0, {"gradients": 1})


@torch.no_grad()
def test_autocast_is_left_to_transformers(model):
    def run():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            token_by_token(model)

    assert left(model, run) == {"autocast": TOKENS}


@torch.no_grad()
def test_training_mode_of_a_part_is_left_to_transformers(model):
    def run():
        model.model.layers[1].mlp.train()
        token_by_token(model)
        model.eval()

    assert left(model, run) == {"training mode": TOKENS}


@torch.no_grad()
def test_embeddings_in_the_place_of_a_token_are_left_to_transformers(model):
    def run():
        cache = prompted(model, IDS[:, :20])
        model(
            inputs_embeds=model.model.embed_tokens(IDS[:, 20:21]), **{NAME: cache}, use_cache=True
        )

    assert left(model, run) == {"inputs_embeds": 1}


@torch.no_grad()
def test_weights_of_another_layout_are_left_to_transformers(fresh):
    gate = fresh.model.layers[3].mlp.gate
    gate.weight = nn.Parameter(gate.weight.t().contiguous().t(), requires_grad=False)
    assert paths(fresh, lambda: token_by_token(fresh)) == (0, {"weights": TOKENS})


@torch.no_grad()
def test_more_experts_than_the_cache_has_room_for_are_left_to_transformers(converted):
    model = loader.from_pretrained(converted("2bit"), kernels="native", slots=[2] * 8)
    for layer in model.model.layers:
        layer.mlp.gate.top_k = 8
    assert paths(model, lambda: token_by_token(model)) == (0, {"experts per token": TOKENS})


@torch.no_grad()
def test_the_torch_backend_has_no_decoder_and_says_so(converted, caplog):
    model = loader.from_pretrained(converted("2bit"), kernels="torch", ram_cache="1GiB")
    with caplog.at_level(logging.WARNING, logger="loader.decode"):
        assert paths(model, lambda: token_by_token(model, ids=IDS[:, :4])) == (0, {"kernels": 2})
    (message,) = caplog.messages
    assert "torch backend" in message and 'kernels="auto"' in message


@torch.no_grad()
def test_the_first_token_that_leaves_the_decoder_is_logged_once_with_the_next_step(fresh, caplog):
    with caplog.at_level(logging.WARNING, logger="loader.decode"):
        handle = fresh.model.norm.register_forward_hook(lambda *_: None)
        token_by_token(fresh)
        handle.remove()
    (message,) = caplog.messages
    assert "hooks: model.norm" in message and "remove the hook" in message


@torch.no_grad()
def test_after_recorded_outputs_the_decoder_goes_on(model):
    def run():
        token_by_token(model, output_router_logits=True, output_hidden_states=True)

    assert left(model, run) == {"other outputs": TOKENS}


@torch.no_grad()
@pytest.mark.parametrize("owner", [mixtral, listeners], ids=["signature", "watch"])
def test_generation_goes_on_if_the_decoder_cannot_be_prepared(fresh, monkeypatch, caplog, owner):
    def fail(*_):
        raise AttributeError("another release")

    monkeypatch.setattr(owner, "signature", fail) if owner is mixtral else monkeypatch.setattr(
        listeners.Watch, "__init__", fail
    )
    with caplog.at_level(logging.WARNING, logger="loader.decode"):
        tokens = fresh.generate(
            IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=2
        )
    assert tokens.shape[1] == IDS.shape[1] + 4
    assert fresh.moe_stats().paths.reasons["decoder failed"] >= 3
    assert len([message for message in caplog.messages if "another release" in message]) == 1
