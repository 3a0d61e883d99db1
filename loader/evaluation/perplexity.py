"""Measures perplexity on text files, by the protocol of examples/tiny-mixtral/README.md."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from formats.errors import MoeConvertError
from formats.progress import Progress
from loader.hf.required_cache import window_arguments


@dataclass(frozen=True)
class TextPerplexity:
    """Result of one text.

    tokens: scored tokens. nll: sum of their negative log-likelihoods, in nats.
    """

    name: str
    tokens: int
    nll: float

    @property
    def perplexity(self) -> float:
        """exp(nll / tokens), or inf if that exceeds the range of a float."""
        mean = self.nll / self.tokens
        return math.exp(mean) if mean < 700 else math.inf


@dataclass(frozen=True)
class PerplexityReport:
    """Results of all texts. window: tokens in a window, BOS included."""

    window: int
    texts: tuple[TextPerplexity, ...]

    @property
    def overall(self) -> TextPerplexity:
        """The result of all texts together: each scored token has the same weight."""
        return TextPerplexity(
            "overall", sum(t.tokens for t in self.texts), math.fsum(t.nll for t in self.texts)
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values for JSON."""

        def plain(text: TextPerplexity) -> dict[str, Any]:
            return {
                "name": text.name,
                "tokens": text.tokens,
                "nll": text.nll,
                "perplexity": text.perplexity,
            }

        return {
            "window": self.window,
            "texts": [plain(t) for t in self.texts],
            "overall": plain(self.overall),
        }


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file with its line ends unchanged.

    Raises MoeConvertError if the file is empty, not UTF-8, or cannot be read.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as e:
        raise MoeConvertError(
            f"{path}: not UTF-8 at byte {e.start}", "save the text as UTF-8"
        ) from None
    except OSError as e:
        raise MoeConvertError(
            f"{path}: cannot be read: {e.strerror}", "check the file's name and permissions"
        ) from None
    if not text:
        raise MoeConvertError(f"{path}: the file is empty", "name a file with text")
    return text


def windows_of(tokenizer: Any, text: str, window: int, max_windows: int | None = None) -> Tensor:
    """Cut `text` into windows, int64 [windows, window].

    A window is BOS and the next window - 1 tokens of the text. Tokens at the end that do not fill a
    window are dropped. max_windows: windows from the beginning of the text; None takes all.
    Raises MoeConvertError if the tokenizer has no BOS token, or if `window` is less than 2.
    """
    bos = tokenizer.bos_token_id
    if bos is None:
        raise MoeConvertError(
            "the tokenizer has no BOS token, but every window begins with one",
            "set bos_token in tokenizer_config.json",
        )
    if window < 2:
        raise MoeConvertError(
            f"window: {window} leaves no token to score after BOS", "give at least 2"
        )
    # verbose=False: transformers warns that the text exceeds the model's length; it is cut below.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // (window - 1)
    if max_windows is not None:
        count = min(count, max_windows)
    body = torch.tensor(ids[: count * (window - 1)], dtype=torch.int64).view(count, window - 1)
    return functional.pad(body, (1, 0), value=bos)


def named_windows(
    tokenizer: Any, name: str, text: str, window: int, max_windows: int | None = None
) -> Tensor:
    """Cut the text `name` into windows, as `windows_of` does.

    Raises MoeConvertError with the text's name if it does not fill one window.
    """
    windows = windows_of(tokenizer, text, window, max_windows)
    if not len(windows):
        raise MoeConvertError(
            f"{name}: shorter than a window of {window} tokens",
            "give a longer text or a smaller window",
        )
    return windows


@torch.inference_mode()
def measure_windows(
    model: Any,
    texts: Sequence[tuple[str, Tensor]],
    *,
    batch: int = 4,
    progress: Progress | None = None,
) -> PerplexityReport:
    """Measure the perplexity of `model` on `texts`.

    model: takes input_ids, int64 [B, W], and returns an object with `logits` [B, W, vocabulary].
    texts: (name, windows of `named_windows`) for each text. batch: windows in one forward pass.
    All tokens of a window but the first, BOS, are scored, in float32.
    """
    results = []
    for name, windows in texts:
        losses: list[float] = []
        for begin in range(0, len(windows), batch):
            ids = windows[begin : begin + batch].to(model.device)
            logits = model(input_ids=ids, **window_arguments(model)).logits
            # One row at a time: float32 logits of a whole batch would be the largest tensor.
            for row, row_ids in zip(logits, ids, strict=True):
                losses.append(
                    functional.cross_entropy(row[:-1].float(), row_ids[1:], reduction="sum").item()
                )
            if progress:
                progress(name, begin + len(ids), len(windows))
        results.append(TextPerplexity(name, windows[:, 1:].numel(), math.fsum(losses)))
    return PerplexityReport(texts[0][1].shape[1], tuple(results))
