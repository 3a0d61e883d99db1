"""The server's prefix caches hold a KV cache in 8 bits."""

import pytest
import torch
from served import ask, engine_of, greedy

import loader
from loader.serving.engine import Limits

SYSTEM = (
    "In the beginning God created the heaven and the earth, and the men of the city said unto him. "
)


@pytest.fixture(scope="module")
def tokenizer(converted):
    return loader.load_tokenizer(converted("2bit"))


def answers(model, tokenizer, prefix_bytes):
    """Answers to prompts with a common beginning; bytes of the prefix caches; tokens from them."""
    prompts = [
        tuple(tokenizer(SYSTEM + text)["input_ids"])
        for text in ("And the ship", "He said", "And the ship was")
    ]
    with engine_of(model, tokenizer, Limits(512, prefix_bytes=prefix_bytes)) as engine:
        texts = [ask(engine, greedy(prompt, 6)).text() for prompt in prompts]
        gauges = engine.gauges()
        cached = engine.metrics.value("prompt_tokens_cached")
    return texts, gauges["prefix_cache_bytes"] / max(1, gauges["prefix_cache_entries"]), cached


def test_answers_over_prefix_caches_are_those_without_in_half_of_the_memory(converted, tokenizer):
    def of(kv_bits, prefix_bytes):
        model = loader.from_pretrained(converted("2bit"), dtype=torch.float32, kv_bits=kv_bits)
        return answers(model, tokenizer, prefix_bytes)

    texts, n_bytes, cached = of(8, 64 << 20)
    assert cached > 2 * len(tokenizer(SYSTEM)["input_ids"]) - 8
    assert of(8, 0)[0] == texts
    # Heads of 32: 34 bytes instead of 128 in float32. A copied cache begins with less room.
    assert n_bytes < 0.3 * of(16, 64 << 20)[1]
