"""Runs text or prompts through a model and gives the routing as a `Trace`."""

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
from loader.evaluation.perplexity import Progress, named_windows, read_text
from loader.hf.loading.plain_checkpoint import check_runnable, checkpoint_architecture, is_converted
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
"""Guesses kept a token and layer (all experts, if they are fewer): twice what a prefetcher of a
top-2 model reads.
"""


@dataclass(frozen=True)
class TracedModel:
    """What a trace says of its model; see `TraceHeader`."""

    name: str
    architecture: Architecture
    expert_bytes: tuple[int, ...]

    @classmethod
    def of_folder(cls, folder: Path) -> "TracedModel":
        """Of a converted folder, or of an ordinary checkpoint, whose experts count at 2 bytes a
        weight (4 where config.json says float32).
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
    """The windows of each of `texts`, as in `named_windows`.

    max_tokens: at most so many of each text, in whole windows, but one window at least.
    MoeConvertError if a text is shorter than a window, or has a token that the model has not.
    """
    most = None if max_tokens is None else max(1, max_tokens // window)
    found = [named_windows(tokenizer, str(path), read_text(path), window, most) for path in texts]
    for path, windows in zip(texts, found, strict=True):
        check_tokens(windows, tokenizer, described.architecture.vocab_size, str(path))
    return found


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
    """The routing of `windows_by_text`, those of `texts`.

    Teacher-forced in reading order, which routes as decoding the same text would: no token counts
    as a prompt's.
    """

    def run(number: int, path: Path) -> Iterator[TracedSequence]:
        windows = windows_by_text[number]
        window = windows.shape[1]
        for begin in range(0, len(windows), batch):
            # The head's logits are not needed.
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
    """The routing of prompts, `inputs_by_text` of each file, with greedy continuations of up to
    `max_new_tokens`.

    The last new token does not go through the model and is not in the trace.
    """

    def run(number: int, path: Path) -> Iterator[TracedSequence]:
        lines = inputs_by_text[number]
        for done, prompt in enumerate(lines, 1):
            inputs = torch.tensor([prompt], device=model.device)
            ids = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=max_new_tokens,
                do_sample=False, temperature=None, top_p=None, top_k=None,
                pad_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
            if progress:
                progress(path.name, done, len(lines))
            yield TracedSequence(number, ids.shape[1] - 1, len(prompt))

    return _trace(model, described, producer, prompts, run)


def read_prompts(
    tokenizer: Any, described: TracedModel, prompts: Sequence[Path], *, raw: bool = False
) -> list[list[list[int]]]:
    """The tokens of each line of each file: as a user's message where the tokenizer has a chat
    template, unless `raw`.

    MoeConvertError if a file has no prompt, or a prompt has no token or one that the model has not.
    """
    found = []
    for path in prompts:
        lines = [line for line in read_text(path).splitlines() if line.strip()]
        if not lines:
            raise MoeConvertError(f"{path}: no prompts", "write one prompt a line")
        found.append([_prompt_of(tokenizer, line, path, raw) for line in lines])
        for ids in found[-1]:
            check_tokens(torch.tensor(ids), tokenizer, described.architecture.vocab_size, str(path))
    return found


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
    # The routers of the loaded model may have been set to another number than its folder says.
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
