"""Runs texts or prompts through a model and records the routing as a `Trace`."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from formats.artifact import Artifact
from formats.config.checkpoint_config import read_config
from formats.errors import MoeConvertError
from formats.index import Architecture
from formats.labels import to_label
from formats.progress import Progress
from formats.unconverted import is_converted
from loader.evaluation.perplexity import named_windows, read_text
from loader.hf.loading.plain_checkpoint import check_runnable, checkpoint_architecture
from loader.hf.loading.tokenizer import check_tokens
from loader.serving.prompts.chat_template import prompt_ids
from loader.traces.routing_recorder import Routing, RoutingRecorder
from loader.traces.trace import (
    TRACE_FORMAT,
    TRACE_VERSION,
    Trace,
    TracedSequence,
    TracedText,
    TraceHeader,
)

GUESSES = 4
"""Guesses recorded for each token and layer, or all experts if they are fewer: twice as many as a
prefetcher of a top-2 model reads.
"""


@dataclass(frozen=True)
class TracedModel:
    """The model's fields in a trace; see `TraceHeader`."""

    name: str
    architecture: Architecture
    expert_bytes: tuple[int, ...]

    @classmethod
    def of_folder(cls, folder: Path) -> "TracedModel":
        """Describe a converted folder, or an ordinary checkpoint.

        A checkpoint's experts count 2 bytes for each weight, or 4 if config.json says float32.
        """
        check_runnable(folder)
        if is_converted(folder):
            artifact = Artifact.open(folder)
            sizes = tuple(
                max(expert.length for expert in layer.experts) for layer in artifact.index.layers
            )
            return cls(to_label(folder.resolve().name), artifact.architecture, sizes)
        config = read_config(folder)
        architecture = checkpoint_architecture(folder, config)
        bytes_per_weight = 4 if config.get("dtype") == "float32" else 2
        size = 3 * architecture.hidden_size * architecture.intermediate_size * bytes_per_weight
        return cls(
            to_label(folder.resolve().name), architecture, (size,) * architecture.expert_layers
        )


def text_windows(
    tokenizer: Any,
    described: TracedModel,
    texts: Sequence[Path],
    window: int,
    max_tokens: int | None,
) -> list[Tensor]:
    """Return the windows of each text file (`named_windows`).

    max_tokens: at most so many tokens of each text, in whole windows, at least one window; None:
    all. Raises MoeConvertError if a text is shorter than a window, or if the model has no embedding
    for a token.
    """
    max_windows = None if max_tokens is None else max(1, max_tokens // window)
    windows_by_text = []
    for path in texts:
        windows = named_windows(tokenizer, str(path), read_text(path), window, max_windows)
        windows_by_text.append(windows)
    for path, windows in zip(texts, windows_by_text, strict=True):
        check_tokens(windows, tokenizer, described.architecture.vocab_size, str(path))
    return windows_by_text


@torch.inference_mode()
def trace_windows(
    model: Any,
    described: TracedModel,
    producer: str,
    texts: Sequence[Path],
    windows_by_text: Sequence[Tensor],
    *,
    batch: int = 4,
    progress: Progress | None = None,
) -> Trace:
    """Record the routing of `windows_by_text`, the windows of `texts`.

    The text is teacher-forced in reading order, so each token routes as in decoding. All tokens
    count as decoded, none as a prompt's.
    """

    def run(number: int, path: Path) -> Iterator[TracedSequence]:
        windows = windows_by_text[number]
        window = windows.shape[1]
        for begin in range(0, len(windows), batch):
            # Without the head: no logits are needed.
            model.model(input_ids=windows[begin : begin + batch].to(model.device), use_cache=False)
            if progress:
                progress(path.name, min(begin + batch, len(windows)), len(windows))
        yield from (TracedSequence(number, window, 0) for _ in windows)

    return _trace(model, described, producer, texts, run)


@torch.inference_mode()
def trace_inputs(
    model: Any,
    tokenizer: Any,
    described: TracedModel,
    producer: str,
    prompts: Sequence[Path],
    inputs_by_text: Sequence[Sequence[list[int]]],
    *,
    max_new_tokens: int = 64,
    progress: Progress | None = None,
) -> Trace:
    """Record the routing of prompts and their greedy continuations.

    inputs_by_text: the prompts' tokens of each file in `prompts` (`read_prompts`). max_new_tokens:
    limit of a continuation. Its last token does not run through the model and is not in the trace.
    """

    def run(number: int, path: Path) -> Iterator[TracedSequence]:
        lines = inputs_by_text[number]
        for done, prompt in enumerate(lines, 1):
            inputs = torch.tensor([prompt], device=model.device)
            ids = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=tokenizer.eos_token_id,
            )
            if progress:
                progress(path.name, done, len(lines))
            yield TracedSequence(number, ids.shape[1] - 1, len(prompt))

    return _trace(model, described, producer, prompts, run)


def read_prompts(
    tokenizer: Any, described: TracedModel, prompts: Sequence[Path], *, raw: bool = False
) -> list[list[list[int]]]:
    """Return the tokens of each prompt of each file; a prompt is one line.

    raw: False puts a prompt into the tokenizer's chat template, if there is one, as a user's
    message. Raises MoeConvertError if a file has no prompt, if a prompt has no token, or if the
    model has no embedding for a token.
    """
    inputs_by_text = []
    for path in prompts:
        lines = [line for line in read_text(path).splitlines() if line.strip()]
        if not lines:
            raise MoeConvertError(f"{path}: the file has no prompts", "write one prompt per line")
        inputs_by_text.append([_prompt_of(tokenizer, line, path, raw) for line in lines])
        for ids in inputs_by_text[-1]:
            check_tokens(torch.tensor(ids), tokenizer, described.architecture.vocab_size, str(path))
    return inputs_by_text


def _prompt_of(tokenizer: Any, line: str, path: Path, raw: bool) -> list[int]:
    try:
        return prompt_ids(tokenizer, line, raw=raw)
    except MoeConvertError as e:
        raise MoeConvertError(f"{path}: prompt {line[:40]!r}: {e.message}", e.hint) from e


def _trace(
    model: Any,
    described: TracedModel,
    producer: str,
    files: Sequence[Path],
    run: Callable[[int, Path], Iterator[TracedSequence]],
) -> Trace:
    guesses = min(GUESSES, described.architecture.num_local_experts)
    sequences: list[TracedSequence] = []
    parts: list[Routing] = []
    with RoutingRecorder(model, guesses) as recorder:
        for number, path in enumerate(files):
            sequences.extend(run(number, path))
            parts.append(recorder.take())
    names = ("experts", "weights", "guesses", "guesses_next_norm")
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    # The loaded model's routers may choose another number of experts than its folder says.
    chosen = arrays["experts"].shape[2]
    header = TraceHeader(
        format=TRACE_FORMAT,
        format_version=TRACE_VERSION,
        producer=producer,
        model=described.name,
        architecture=msgspec.structs.replace(described.architecture, num_experts_per_tok=chosen),
        expert_bytes=list(described.expert_bytes),
        guesses=guesses,
        texts=[
            TracedText(to_label(path.name), hashlib.sha256(path.read_bytes()).hexdigest())
            for path in files
        ],
        sequences=sequences,
    )
    return Trace(header, **arrays)
