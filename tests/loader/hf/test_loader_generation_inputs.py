"""Inputs that generate prepares between tokens: equal to transformers', but grown in place."""

import inspect

import pytest
import torch
from transformers import DynamicCache, MixtralForCausalLM
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

import loader
from loader.hf.generation_inputs import MIN_COLUMNS, GenerationInputs, GrowingRow
from loader.hf.private_names import generation_methods

IDS = torch.arange(7, 27)[None]


@pytest.fixture(scope="module")
def model(converted):
    return loader.from_pretrained(converted("2bit"), dtype=torch.float32)


def test_a_row_grows_in_place_and_is_a_new_one_where_it_was_cut():
    rows, row = GrowingRow(), torch.arange(5)[None]
    grown = [row]
    for value in range(5, 5 + 2 * MIN_COLUMNS):
        grown.append(rows.appended(grown[-1], value))
    assert all(torch.equal(part[0], torch.arange(5 + number)) for number, part in enumerate(grown))
    assert grown[1].data_ptr() == grown[100].data_ptr()
    cut = rows.appended(grown[-1][:, :9], 77)
    assert cut.tolist() == [[*range(9), 77]]
    assert torch.equal(grown[-1][0], torch.arange(5 + 2 * MIN_COLUMNS))
    other = rows.appended(grown[-1], 1)
    assert other.tolist()[0][-2:] == [4 + 2 * MIN_COLUMNS, 1]
    assert cut.tolist() == [[*range(9), 77]]


def test_a_row_of_inference_mode_may_go_on_outside():
    rows = GrowingRow()
    with torch.inference_mode():
        row = rows.appended(torch.zeros(1, 3, dtype=torch.int64), 1)
    row = rows.appended(row, 2)
    with torch.inference_mode():
        row = rows.appended(row, 3)
    assert row.tolist() == [[0, 0, 0, 1, 2, 3]]


def prepared(owner, model, values):
    """Return the kwargs after one token and the inputs of the next token.

    owner: the model or its plain class, whose methods prepare them.
    """
    bound = () if owner is model else (model,)
    outputs = {} if values["cache"] is None else MoeCausalLMOutputWithPast(cache=values["cache"])
    kwargs = owner._update_model_kwargs_for_generation(*bound, outputs, dict(values))
    return kwargs, owner.prepare_inputs_for_generation(
        *bound, IDS, next_sequence_length=1, **kwargs
    )


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"attention_mask": None},
        {"position_ids": None},
        {"attention_mask": torch.tensor([[0, 0, 1, 1, 1]])},
        {"attention_mask": torch.ones(1, 5, dtype=torch.bool)},
        {"attention_mask": torch.ones(2, 5, dtype=torch.int64)},
        {"token_type_ids": torch.zeros(1, 5, dtype=torch.int64)},
        {"output_router_logits": True},
        {"use_cache": None},
        {"cache": None},
    ],
    ids=lambda change: "-".join(change) or "plain",
)
def test_the_values_are_transformers_own(model, change):
    if generation_methods() is None:
        pytest.skip("this version of transformers keeps its own")
    values = {
        "cache": DynamicCache(),
        "attention_mask": torch.ones(1, 5, dtype=torch.int64),
        "position_ids": torch.arange(5)[None],
        "use_cache": True,
    }
    for ours, plain in zip(
        *(prepared(owner, model, values | change) for owner in (model, MixtralForCausalLM)),
        strict=True,
    ):
        assert list(ours) == list(plain)
        for name in plain:
            if isinstance(plain[name], torch.Tensor):
                assert (
                    torch.equal(ours[name], plain[name]) and ours[name].dtype == plain[name].dtype
                )
                assert ours[name].is_contiguous()
            else:
                assert ours[name] is plain[name]


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 5},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "prompt_lookup_num_tokens": 3},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "cache_implementation": "static"},
    ],
    ids=["greedy", "sample", "beams", "lookup", "no-cache", "static"],
)
def test_generate_gives_the_same_tokens(model, monkeypatch, options):
    def run():
        torch.manual_seed(3)
        return model.generate(
            IDS,
            max_new_tokens=300 if options == {"do_sample": False} else 20,
            min_new_tokens=20,
            pad_token_id=2,
            **options,
        )

    ours = run()
    for name in ("prepared", "updated"):
        monkeypatch.setattr(GenerationInputs, name, lambda *_: None)
    assert torch.equal(ours, run())


def test_a_padded_prompt_gives_the_tokens_of_the_bare_one(model):
    bare = model.generate(IDS, max_new_tokens=20, do_sample=False, pad_token_id=2)
    ids = torch.cat([torch.full((1, 3), 2), IDS], 1)
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    padded = model.generate(
        ids, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=2
    )
    assert torch.equal(padded[:, 3:], bare)


def test_the_signatures_stay(model):
    for name in ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation"):
        own = list(inspect.signature(getattr(GenerationMixin, name)).parameters)[1:]
        assert list(inspect.signature(getattr(model, name)).parameters) == own
