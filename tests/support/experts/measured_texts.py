"""Perplexity and traces of texts in one call, as the commands make them in two."""

from loader.evaluation.perplexity import measure_windows, named_windows
from loader.hf.loading.tokenizer import check_tokens, embedding_rows
from loader.traces.record_trace import read_prompts, text_windows, trace_inputs, trace_windows


def measure_perplexity(
    model, tokenizer, texts, *, window=256, batch=4, max_windows=None, progress=None
):
    """`measure_windows` of (name, text) pairs."""
    named = [
        (name, named_windows(tokenizer, name, text, window, max_windows)) for name, text in texts
    ]
    for name, windows in named:
        check_tokens(windows, tokenizer, embedding_rows(model), name)
    return measure_windows(model, named, batch=batch, progress=progress)


def trace_texts(
    model, tokenizer, described, producer, texts, *, window=256, max_tokens=None, **options
):
    """`trace_windows` of UTF-8 files."""
    windows = text_windows(tokenizer, described, texts, window, max_tokens)
    return trace_windows(model, described, producer, texts, windows, **options)


def trace_prompts(model, tokenizer, described, producer, prompts, *, raw=False, **options):
    """`trace_inputs` of UTF-8 files with one prompt a line."""
    inputs = read_prompts(tokenizer, described, prompts, raw=raw)
    return trace_inputs(model, tokenizer, described, producer, prompts, inputs, **options)
