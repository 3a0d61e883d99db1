"""A conversation: its prompts, its KV cache, and its state after an interrupt."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from project_paths import SUPPORT

import loader
from formats.errors import MoeConvertError
from loader.hf.private_names import cache_field
from loader.serving.answers.generation import Generation
from loader.serving.answers.settings import GenerationSettings
from loader.serving.prefixes.prefix_cache import PrefixCache, common_prefix
from loader.serving.prompts.chat_template import (
    ChatTemplate,
    PlainText,
    plain_template,
    prompt_ids,
    template_of,
    text_ids,
    with_one_bos,
)
from loader.serving.session import ContextFullError, Session

TEMPLATE = (SUPPORT / "serving" / "templates" / "instruct.jinja").read_text()
QUESTIONS = ("So Jonah arose, and went to Nineveh", "And then?", "import os")
BOS = 1


@pytest.fixture(scope="module")
def model(converted: Callable[[str], Path]) -> Any:
    return loader.from_pretrained(converted("2bit"), kernels="torch")


@pytest.fixture(scope="module")
def tokenizer(converted: Callable[[str], Path]) -> Any:
    return loader.load_tokenizer(converted("2bit"))


@pytest.fixture
def session(model: Any, tokenizer: Any) -> Session:
    return new_session(model, tokenizer)


def new_session(model: Any, tokenizer: Any, **options: Any) -> Session:
    template = template_of(tokenizer, TEMPLATE)
    return Session(model, tokenizer, template, GenerationSettings(max_new_tokens=8), **options)


def nothing(_text: str) -> None:
    pass


def by_generate(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """Return the greedy tokens of the model's own generate, without an earlier cache."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    result = model.generate(
        ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )
    return list(result[0, len(prompt) :].tolist())


def test_kept_keys_and_values_change_no_token(model: Any, tokenizer: Any, session: Session) -> None:
    for question in QUESTIONS:
        prompt = ChatTemplate(tokenizer, TEMPLATE).ids(
            [*session.messages, {"role": "user", "content": question}]
        )
        answer = session.ask(question, nothing)
        assert list(answer.token_ids) == by_generate(model, prompt, 8)
        assert answer.prompt_tokens == len(prompt)
    # The template's `[user]` and the earlier turns are not computed again.
    assert [answer.reused_tokens > 0 for answer in session.answers] == [False, True, True]
    assert session.answers[2].reused_tokens >= session.answers[1].prompt_tokens - 1


def test_pieces_make_the_answers_text(tokenizer: Any, session: Session) -> None:
    pieces: list[str] = []
    answer = session.ask(QUESTIONS[0], pieces.append)
    assert (
        "".join(pieces)
        == answer.text
        == tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    )
    assert session.messages == [
        {"role": "user", "content": QUESTIONS[0]},
        {"role": "assistant", "content": answer.text},
    ]
    assert answer.finish_reason == "length"


def test_an_interrupt_keeps_what_came_and_the_session(
    model: Any, tokenizer: Any, session: Session
) -> None:
    pieces: list[str] = []

    def interrupt(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.ask(QUESTIONS[0], interrupt)
    (answer,) = session.answers
    assert (answer.finish_reason, answer.new_tokens) == ("interrupted", 3)
    assert session.messages[-1]["content"] == answer.text == "".join(pieces)
    prompt = ChatTemplate(tokenizer, TEMPLATE).ids(
        [*session.messages, {"role": "user", "content": "More"}]
    )
    assert list(session.ask("More", nothing).token_ids) == by_generate(model, prompt, 8)


def test_stop_ends_after_the_present_token(model: Any, tokenizer: Any) -> None:
    prompt = text_ids(tokenizer, QUESTIONS[0])
    generation = Generation(
        model, tokenizer, prompt, GenerationSettings(max_new_tokens=8), PrefixCache(model)
    )
    answer = generation.run(lambda _: generation.stop())
    assert (answer.finish_reason, len(answer.token_ids)) == ("cancelled", 1)


def test_an_end_token_is_no_text_and_finishes_with_stop(
    model: Any, tokenizer: Any, monkeypatch: Any
) -> None:
    prompt = text_ids(tokenizer, QUESTIONS[0])
    first, second = by_generate(model, prompt, 2)
    monkeypatch.setattr(model.generation_config, "eos_token_id", [second, 5])
    answer = Generation(model, tokenizer, prompt, GenerationSettings(), PrefixCache(model)).run(
        nothing
    )
    assert (answer.token_ids, answer.finish_reason) == ((first, second), "stop")


def test_a_stop_string_is_not_in_the_text(model: Any, tokenizer: Any) -> None:
    prompt = text_ids(tokenizer, QUESTIONS[0])
    whole = tokenizer.decode(by_generate(model, prompt, 8), skip_special_tokens=True)
    pieces: list[str] = []
    settings = GenerationSettings(max_new_tokens=8, stop=(whole[5:9],))
    answer = Generation(model, tokenizer, prompt, settings, PrefixCache(model)).run(pieces.append)
    assert "".join(pieces) == answer.text == whole[: whole.index(whole[5:9])]
    assert answer.finish_reason == "stop"


def test_a_full_context_says_how_many_turns_must_go(model: Any, tokenizer: Any) -> None:
    session = new_session(model, tokenizer, context_tokens=60)
    with pytest.raises(ContextFullError, match=r"has \d+ of 60 tokens"):
        for _ in range(9):
            session.ask("So Jonah arose", nothing)
    turns = session.turns
    dropped = session.turns_to_drop("So Jonah arose")
    assert dropped == 1 < turns
    session.drop(dropped)
    assert session.ask("So Jonah arose", nothing).text
    assert session.turns == turns
    assert session.turns_to_drop("Jonah " * 60) is None


def test_an_answer_ends_where_the_context_does(model: Any, tokenizer: Any) -> None:
    session = new_session(model, tokenizer, context_tokens=40)
    session.settings = GenerationSettings(max_new_tokens=1000)
    answer = session.ask("So", nothing)
    assert answer.finish_reason == "length"
    assert answer.prompt_tokens + len(answer.token_ids) == 40


def test_a_refused_system_message_leaves_the_one_before(model: Any, tokenizer: Any) -> None:
    refusing = (
        "{% if messages[0].content == 'Be long' %}{{ raise_exception('no system') }}{% endif %}"
        + TEMPLATE
    )
    template = ChatTemplate(tokenizer, refusing)
    session = Session(model, tokenizer, template, GenerationSettings(), system="Be brief")
    with pytest.raises(MoeConvertError, match="no system"):
        session.set_system("Be long")
    assert session.system == "Be brief"


@pytest.mark.parametrize(
    "template", ["{% for %}", "{{ 1 / 0 }}", "{{ messages[9].content }}", "{{ x.y.z }}", ""]
)
def test_a_broken_template_is_our_error(tokenizer: Any, template: str) -> None:
    with pytest.raises(MoeConvertError, match="chat template"):
        ChatTemplate(tokenizer, template).ids([{"role": "user", "content": "x"}])


def test_a_prompt_never_begins_with_two_bos(tokenizer: Any) -> None:
    assert text_ids(tokenizer, "So Jonah")[:2].count(BOS) == 1
    assert text_ids(tokenizer, "<s>So Jonah") == text_ids(tokenizer, "So Jonah")
    assert text_ids(tokenizer, "<s><s>So Jonah") == text_ids(tokenizer, "So Jonah")
    messages = [{"role": "user", "content": "So Jonah"}]
    assert ChatTemplate(tokenizer, TEMPLATE).ids(messages)[:2].count(BOS) == 1
    assert ChatTemplate(tokenizer, "{{ bos_token }}" + TEMPLATE).ids(messages)[:2].count(BOS) == 1
    assert PlainText(tokenizer).ids(messages) == text_ids(tokenizer, "So Jonah")
    assert with_one_bos([7, BOS, BOS], tokenizer) == [7, BOS, BOS]


@pytest.mark.parametrize("has_bos", [True, False])
def test_the_plain_template_gives_the_prompts_of_plain_text(
    tokenizer: Any, monkeypatch: Any, has_bos: bool
) -> None:
    if not has_bos:
        plain = functools.partial(tokenizer.__class__.__call__, tokenizer, add_special_tokens=False)
        monkeypatch.setattr(tokenizer.__class__, "__call__", lambda _, text, **__: plain(text))
    messages = [
        {"role": "user", "content": "So Jonah"},
        {"role": "assistant", "content": "  arose {{ x }} <b>"},
        {"role": "user", "content": "and?"},
    ]
    expected = PlainText(tokenizer).ids(messages)
    assert (expected[0] == BOS) == has_bos
    assert ChatTemplate(tokenizer, plain_template(tokenizer)).ids(messages) == expected


def test_a_prompt_goes_through_the_tokenizers_template(tokenizer: Any, monkeypatch: Any) -> None:
    assert prompt_ids(tokenizer, "So") == text_ids(tokenizer, "So")
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    assert prompt_ids(tokenizer, "So") == text_ids(tokenizer, "[user] So\n")
    assert prompt_ids(tokenizer, "So", raw=True) == text_ids(tokenizer, "So")


def test_a_common_prefix_is_reused_but_for_the_last_token(model: Any) -> None:
    cache = PrefixCache(model)
    model(torch.tensor([[1, 5, 6, 7]]), **{cache_field(): cache.kv})
    cache.record([1, 5, 6, 7])
    assert list(cache.tokens) == [1, 5, 6, 7]
    assert cache.begin([1, 5, 6, 7]) == 3
    assert cache.begin([1, 5, 9]) == 2
    assert cache.kv.get_seq_length() == 2
    assert cache.begin([2, 5]) == 0
    assert cache.kv.get_seq_length() == 0
    assert common_prefix([], [1]) == 0


def test_a_cache_that_is_shorter_than_noted_is_not_trusted_beyond_its_end(model: Any) -> None:
    cache = PrefixCache(model)
    model(torch.tensor([[1, 5, 6, 7]]), **{cache_field(): cache.kv})
    cache.record([1, 5, 6, 7])
    cache.kv.crop(-2)
    assert cache.begin([1, 5, 6, 7, 8]) == 2


def test_a_full_sliding_window_begins_anew(model: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(model.config, "sliding_window", 4)
    cache = PrefixCache(model)
    model(torch.tensor([[1, 5, 6]]), **{cache_field(): cache.kv})
    cache.record([1, 5, 6])
    assert cache.begin([1, 5, 9, 9, 9, 9]) == 2
    model(torch.tensor([[9, 9, 9, 9]]), **{cache_field(): cache.kv})
    cache.record([1, 5, 9, 9, 9, 9])
    assert cache.begin([1, 5, 9, 9, 9, 9, 8]) == 6
    assert cache.begin([1, 5, 9, 7]) == 0
