"""Sampling settings, and the text of tokens as it comes."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from project_paths import EXAMPLE
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from formats.errors import RecipeError
from loader.serving.answers.settings import GenerationSettings
from loader.serving.answers.text_stream import TextStream

TOKENIZER: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(EXAMPLE)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", 1e-320),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("max_new_tokens", 0),
        ("seed", 1 << 70),
        ("stop", ("",)),
    ],
)
def test_a_value_out_of_range_is_named(field: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=field):
        GenerationSettings(**{field: value})


def test_sampling_begins_with_any_sampling_field() -> None:
    assert not GenerationSettings().samples
    assert not GenerationSettings(temperature=0, top_p=0.5).samples
    for field in ("temperature", "top_p", "top_k", "min_p"):
        assert GenerationSettings(**{field: 1}).samples


def test_a_models_own_sampling_fills_what_is_not_set() -> None:
    own = SimpleNamespace(do_sample=True, temperature=0.6, top_p=0.95, top_k=20)
    filled = GenerationSettings(top_p=0.5).filled_from(own)
    assert (filled.temperature, filled.top_p, filled.top_k, filled.min_p) == (0.6, 0.5, 20, None)
    assert GenerationSettings(temperature=0).filled_from(own) == GenerationSettings(temperature=0)
    greedy = SimpleNamespace(do_sample=False, temperature=0.6)
    assert GenerationSettings().filled_from(greedy) == GenerationSettings()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 4095), max_size=40))
def test_pieces_are_whole_characters_and_make_the_whole_text(ids: list[int]) -> None:
    stream = TextStream(TOKENIZER)
    pieces = [stream.push(token) for token in ids]
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text == TOKENIZER.decode(ids, skip_special_tokens=True)


def test_a_character_of_several_tokens_comes_whole() -> None:
    ids = TOKENIZER("a漢🙂b", add_special_tokens=False)["input_ids"]
    stream = TextStream(TOKENIZER)
    pieces = [stream.push(token) for token in ids] + [stream.finish()]
    assert "".join(pieces) == "a漢🙂b"
    assert not any("�" in piece for piece in pieces)
    assert len(ids) > 4


@settings(max_examples=200, deadline=None)
@given(
    st.text("ab ", max_size=30),
    st.lists(st.text("ab ", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    letters = SimpleNamespace(decode=lambda ids, **_: "".join(map(chr, ids)))
    stream = TextStream(letters, tuple(stops))
    for letter in text:
        stream.push(ord(letter))
        if stream.stopped:
            break
    stream.finish()
    # As tokens come: the stop string that ends first, and of those that end there the longest.
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    longest = max(
        (len(stop) for stop in stops if ends and text[: ends[0]].endswith(stop)), default=0
    )
    assert stream.text == (text[: ends[0] - longest] if ends else text)
    assert stream.stopped == bool(ends)
