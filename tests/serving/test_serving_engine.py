"""The queue, the thread that generates, and the prefix caches, without HTTP."""

import pytest
import torch
from served import Heard, PausedModel, ask, engine_of, greedy

import loader
from loader.serving.answers.events import Counts, End, Failure, Piece
from loader.serving.answers.request import Request, Sampling
from loader.serving.engine import ClosedError, Limits, QueueFullError

PROMPT = "So Jonah arose, and went to Nineveh, according to"


@pytest.fixture(scope="module")
def model(converted):
    return loader.from_pretrained(converted("2bit"))


@pytest.fixture(scope="module")
def tokenizer(converted):
    return loader.load_tokenizer(converted("2bit"))


@pytest.fixture
def engine(model, tokenizer):
    with engine_of(model, tokenizer) as engine:
        yield engine


@pytest.fixture(scope="module")
def prompt(tokenizer):
    return tuple(tokenizer(PROMPT)["input_ids"])


def tokens_of(tokenizer, text):
    return tuple(tokenizer(text)["input_ids"])


def expected_text(model, tokenizer, prompt, tokens):
    """Return the greedy text of transformers' generate."""
    ids = torch.tensor([prompt])
    new = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
    )[0]
    return tokenizer.decode(new[len(prompt) :], skip_special_tokens=True)


def test_greedy_answer_is_that_of_generate(engine, model, tokenizer, prompt):
    heard = ask(engine, greedy(prompt, 12))
    assert heard.text() == expected_text(model, tokenizer, prompt, 12)
    assert heard.end() == End("length", Counts(len(prompt), 0, 12))
    assert len(heard.events) > 8


def test_prompt_of_several_parts_gives_the_answer_of_one(model, tokenizer, prompt, monkeypatch):
    monkeypatch.setattr("loader.serving.answers.token_loop.PROMPT_PART", 5)
    with engine_of(model, tokenizer) as engine:
        assert ask(engine, greedy(prompt, 6)).text() == expected_text(model, tokenizer, prompt, 6)


def test_single_tokens_take_the_decoder_after_a_cancellable_prompt(engine, model, prompt):
    model.reset_moe_stats()
    ask(engine, greedy(prompt, 6))
    assert model.moe_stats().paths.reasons == {"prompt": len(prompt)}


def test_stop_text_ends_the_answer_and_is_not_in_it(engine, model, tokenizer, prompt):
    whole = expected_text(model, tokenizer, prompt, 12)
    stop = whole[10:14]
    heard = ask(engine, greedy(prompt, 12, stop=("never seen", stop)))
    assert heard.text() == whole[: whole.index(stop)]
    assert heard.end().reason == "stop"


def test_logprobs_are_of_the_tokens_whose_text_was_given(engine, prompt):
    whole = ask(engine, greedy(prompt, 12)).text()
    stop = whole[10:14]
    heard = ask(engine, greedy(prompt, 12, stop=(stop,), logprobs=2))
    tokens = [
        token for event in heard.events if isinstance(event, Piece) for token in event.logprobs
    ]
    assert tokens and all(token.begin < len(heard.text()) for token in tokens)
    for token in tokens:
        assert token.top[0] == (token.token, token.logprob)
        assert token.top[1][1] <= token.logprob < 0


def test_same_seed_gives_the_same_answer_whatever_ran_between(engine, prompt):
    request = Request(prompt, 12, Sampling(temperature=1.5, top_p=0.95, seed=7))
    first = ask(engine, request).text()
    ask(engine, Request(prompt, 5, Sampling(seed=8)))
    assert ask(engine, request).text() == first
    others = {ask(engine, Request(prompt, 12, Sampling(temperature=1.5))).text() for _ in range(3)}
    assert others != {first}


@pytest.mark.parametrize(
    "sampling", [Sampling(1e-30), Sampling(1e-5), Sampling(1.0, top_k=1), Sampling(top_p=1e-9)]
)
def test_extreme_sampling_chooses_the_likeliest_token(engine, prompt, sampling):
    assert ask(engine, Request(prompt, 6, sampling)).text() == ask(engine, greedy(prompt, 6)).text()


def test_bias_and_penalties_change_the_answer(engine, tokenizer, prompt):
    plain = ask(engine, greedy(prompt, 30)).text()
    (token,) = tokens_of(tokenizer, "and")[-1:]
    forced = ask(engine, Request(prompt, 3, Sampling(temperature=0, bias={token: 100.0}))).text()
    assert forced.count("and") == 3
    for penalty in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
        assert ask(engine, Request(prompt, 30, Sampling(0, **{penalty: 2.0}))).text() != plain


def test_conversation_that_goes_on_reuses_its_prefix(engine, tokenizer, prompt):
    heard = ask(engine, greedy(prompt, 8))
    longer = (
        *prompt,
        *tokens_of(tokenizer, heard.text())[-4:],
        *tokens_of(tokenizer, "And the men said")[1:],
    )
    counts = ask(engine, greedy(longer, 4)).end().counts
    assert counts.cached >= len(prompt)
    assert engine.metrics.value("prompt_tokens_cached") == counts.cached


def test_interleaved_conversations_do_not_mix(converted, tokenizer):
    # In bfloat16 a prompt and single tokens round differently, which decides between tokens that
    # are equally likely.
    model = loader.from_pretrained(converted("2bit"), dtype=torch.float32)
    system = (
        "In the beginning God created the heaven and the earth, "
        "and the men of the city said unto him. "
    )
    begins = [tokens_of(tokenizer, system + text) for text in ("And the ship", "He said")]

    def turns(engine, number):
        prompt = begins[number]
        for text in ("Then they said", "And he went"):
            heard = yield greedy(prompt, 4)
            prompt = (
                *prompt,
                *tokens_of(tokenizer, heard.text())[1:],
                *tokens_of(tokenizer, text)[1:],
            )
        yield greedy(prompt, 4)

    def answers(engine, numbers):
        """Texts by conversation, whose turns come in the order of `numbers`."""
        talks = {number: turns(engine, number) for number in set(numbers)}
        texts = {number: [] for number in talks}
        last = {}
        for number in numbers:
            request = talks[number].send(last.get(number))
            last[number] = ask(engine, request)
            texts[number].append(last[number].text())
        return texts

    with engine_of(model, tokenizer, Limits(512, prefix_bytes=0)) as engine:
        alone = answers(engine, [0, 0, 0, 1, 1, 1])
        assert engine.metrics.value("prompt_tokens_cached") == 0
    with engine_of(model, tokenizer) as engine:
        mixed = answers(engine, [0, 1, 1, 0, 0, 1])
        assert engine.metrics.value("prompt_tokens_cached") > 0
        assert engine.gauges()["prefix_cache_entries"] == 2
    assert mixed == alone


def test_prefix_caches_stay_within_their_bytes(model, tokenizer, prompt):
    with engine_of(model, tokenizer) as engine:
        ask(engine, greedy(prompt, 4))
        one = engine.gauges()["prefix_cache_bytes"]
    with engine_of(model, tokenizer, Limits(512, prefix_bytes=2 * one)) as engine:
        for text in ("And the ship", "The king", "He said unto them"):
            ask(engine, greedy(tokens_of(tokenizer, text), 4))
        gauges = engine.gauges()
        assert gauges["prefix_cache_entries"] == 2
        assert 0 < gauges["prefix_cache_bytes"] <= 2 * one
        # The oldest has gone.
        assert (
            ask(engine, greedy((*tokens_of(tokenizer, "He said unto them"), 5), 1))
            .end()
            .counts.cached
            > 0
        )
        assert (
            ask(engine, greedy((*tokens_of(tokenizer, "And the ship"), 5), 1)).end().counts.cached
            <= 1
        )


def test_full_queue_is_refused_with_a_time(model, tokenizer, prompt):
    paused = PausedModel(model)
    with engine_of(paused, tokenizer, Limits(512, max_queue=1)) as engine:
        paused.pause()
        running, waiting = Heard(), Heard()
        engine.submit(greedy(prompt, 2), running)
        paused.wait_for_pass()
        job = engine.submit(greedy(prompt, 2), waiting)
        with pytest.raises(QueueFullError, match="1 requests wait") as refused:
            engine.submit(greedy(prompt, 2), Heard())
        assert refused.value.retry_after_s >= 1
        job.cancel()
        next_one = Heard()
        engine.submit(greedy(prompt, 2), next_one)
        paused.resume()
        assert isinstance(next_one.end(), End) and isinstance(running.end(), End)
        assert waiting.end() == Failure(cancelled=True)


def test_answers_come_in_the_order_of_their_requests(model, tokenizer, prompt):
    paused, order = PausedModel(model), []
    with engine_of(paused, tokenizer) as engine:
        paused.pause()
        ends = []
        for number in range(4):
            heard = Heard()
            ends.append(heard)
            engine.submit(
                greedy(prompt, 2),
                lambda event, n=number, heard=heard: (order.append(n), heard(event)),
            )
        paused.resume()
        for heard in ends:
            heard.end()
    assert order == sorted(order)


def test_cancelled_generation_ends_within_one_token(model, tokenizer, prompt):
    paused = PausedModel(model)
    with engine_of(paused, tokenizer) as engine:
        paused.pause()
        heard = Heard()
        job = engine.submit(greedy(prompt, 100), heard)
        paused.wait_for_pass()
        job.cancel()
        paused.resume()
        assert heard.end().cancelled
        assert paused.passes == 1
        assert ask(engine, greedy(prompt, 3)).end().reason == "length"


def test_cancelled_prompt_ends_before_its_next_layer(model, tokenizer, prompt):
    jobs, layers = [], []
    blocks = model.get_decoder().layers
    hooks = [
        layer.register_forward_pre_hook(lambda *_, n=n: layers.append(n))
        for n, layer in enumerate(blocks)
    ]
    hooks.append(blocks[2].register_forward_pre_hook(lambda *_: jobs[0].cancel()))
    paused, heard = PausedModel(model), Heard()
    try:
        with engine_of(paused, tokenizer) as engine:
            paused.pause()
            jobs.append(engine.submit(greedy(prompt, 5), heard))
            paused.resume()
            assert heard.end().cancelled
    finally:
        for hook in hooks:
            hook.remove()
    # The engine's check of the third layer comes after the test's hooks.
    assert layers == [0, 1, 2]


def test_error_of_the_model_fails_one_generation_only(model, tokenizer, prompt):
    class Failing(PausedModel):
        def __call__(self, **arguments):
            if self.passes == 2:
                self.passes += 1
                raise OSError("the disk is gone")
            return super().__call__(**arguments)

    with engine_of(Failing(model), tokenizer) as engine:
        failure = ask(engine, greedy(prompt, 10)).end()
        assert isinstance(failure, Failure) and "OSError: the disk is gone" in failure.error
        assert ask(engine, greedy(prompt, 3)).end() == End("length", Counts(len(prompt), 0, 3))


def test_closing_cancels_what_runs_and_refuses_more(model, tokenizer, prompt):
    paused = PausedModel(model)
    with engine_of(paused, tokenizer) as engine:
        paused.pause()
        running, waiting = Heard(), Heard()
        engine.submit(greedy(prompt, 100), running)
        paused.wait_for_pass()
        engine.submit(greedy(prompt, 100), waiting)
        engine.close(finish_s=0, cancel_s=0)
        with pytest.raises(ClosedError):
            engine.submit(greedy(prompt, 1), Heard())
        paused.resume()
        assert running.end().cancelled and waiting.end().cancelled
