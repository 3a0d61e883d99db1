"""Small traces for tests: of given or random routing."""

import numpy as np

from formats.index import Architecture
from loader.traces.trace import (
    TRACE_FORMAT,
    TRACE_VERSION,
    Trace,
    TracedSequence,
    TracedText,
    TraceHeader,
)


def trace_of(experts, count=8, guesses=None, prompts=(), expert_bytes=None):
    """A trace of `experts` [tokens, layers, chosen] in one sequence without a prompt, or in
    `prompts`: (tokens, prompt tokens) of each sequence. The guesses [tokens, layers - 1, n] are the
    first experts if not given.
    """
    experts = np.array(experts, np.uint8)
    tokens, layers, chosen = experts.shape
    if guesses is None:
        guesses = np.broadcast_to(
            np.arange(min(4, count), dtype=np.uint8), (tokens, layers - 1, min(4, count))
        )
    guesses = np.array(guesses, np.uint8)
    header = TraceHeader(
        format=TRACE_FORMAT,
        format_version=TRACE_VERSION,
        producer="tests",
        model="made",
        architecture=Architecture(
            model_type="mixtral",
            activation="silu",
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_local_experts=count,
            num_experts_per_tok=chosen,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            vocab_size=100,
            tie_word_embeddings=False,
            expert_modules=[f"model.layers.{layer}.mlp.experts" for layer in range(layers)],
        ),
        expert_bytes=list(expert_bytes or [1000] * layers),
        guesses=guesses.shape[2],
        texts=[TracedText("made.txt", "0" * 64)],
        sequences=[TracedSequence(0, *sizes) for sizes in prompts or [(tokens, 0)]],
    )
    weights = np.full(experts.shape, 1 / chosen, np.float16)
    return Trace(header, experts, weights, guesses, guesses[:, :, ::-1].copy())


def random_experts(seed, tokens, layers=1, count=8, chosen=2, skew=1.0):
    """Return uint8 [tokens, layers, chosen], distinct per token; skew > 0 prefers low ids."""
    generator = np.random.default_rng(seed)
    keys = generator.gumbel(size=(tokens, layers, count)) - skew * np.log(np.arange(1, count + 1))
    return np.argsort(-keys, axis=2)[:, :, :chosen].astype(np.uint8)
