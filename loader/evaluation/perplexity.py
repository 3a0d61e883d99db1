"""Perplexity of any causal language model on text files, by the protocol of
examples/tiny-mixtral/README.md.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from formats.errors import MoeConvertError

Progress = Callable[[str, int, int], None]
"""Called with (name of the text, done windows, all windows of the text)."""


@dataclass(frozen=True)
class TextPerplexity:
    """One text's result: `nll` is the summed negative log-likelihood (nats) of `tokens` scored
    tokens.
    """

    name: str
    tokens: int
    nll: float

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood; inf where it leaves the range of a float."""
        mean = self.nll / self.tokens
        return math.exp(mean) if mean < 700 else math.inf


@dataclass(frozen=True)
class PerplexityReport:
    """Results by text, and `overall`: the mean over all scored tokens."""

    window: int
    texts: tuple[TextPerplexity, ...]

    @property
    def overall(self) -> TextPerplexity:
        return TextPerplexity(
            "overall", sum(t.tokens for t in self.texts), math.fsum(t.nll for t in self.texts)
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""

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
    """The text of a UTF-8 file as it is, line ends included. MoeConvertError: empty, not UTF-8,
    unreadable.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as e:
        raise MoeConvertError(
            f"{path}: not UTF-8 at byte {e.start}", "save the text as UTF-8"
        ) from None
    except OSError as e:
        raise MoeConvertError(
            f"{path}: cannot be read: {e.strerror}", "check the name and its permissions"
        ) from None
    if not text:
        raise MoeConvertError(f"{path}: the file is empty", "give a text")
    return text


def windows_of(tokenizer: Any, text: str, window: int, max_windows: int | None = None) -> Tensor:
    """`text` as int64 [windows, window]: BOS, then window - 1 tokens of the text; the rest at the
    end is dropped.
    """
    bos = tokenizer.bos_token_id
    if bos is None:
        raise MoeConvertError(
            "the tokenizer has no BOS token, with which every window begins",
            "see tokenizer_config.json",
        )
    if window < 2:
        raise MoeConvertError(f"window: {window} holds no token besides BOS", "give at least 2")
    # verbose=False: no warning that the whole text is longer than the model takes; it is cut below.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // (window - 1)
    if max_windows is not None:
        count = min(count, max_windows)
    body = torch.tensor(ids[: count * (window - 1)], dtype=torch.int64).view(count, window - 1)
    return functional.pad(body, (1, 0), value=bos)


def named_windows(
    tokenizer: Any, name: str, text: str, window: int, max_windows: int | None = None
) -> Tensor:
    """As `windows_of`; MoeConvertError naming the text if it is shorter than a window."""
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
    """Perplexity of `model` (called with input_ids int64 [B, W], answering with `logits` [B, W,
    vocabulary]) on (name, windows) pairs, windows as from `named_windows`.

    The first token of a window is BOS; all its others are scored, in float32.
    """
    results = []
    for name, windows in texts:
        losses: list[float] = []
        for begin in range(0, len(windows), batch):
            ids = windows[begin : begin + batch].to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits
            # Row by row: the float32 copy of a whole batch of logits would be the largest tensor of
            # all.
            for row, row_ids in zip(logits, ids, strict=True):
                losses.append(
                    functional.cross_entropy(row[:-1].float(), row_ids[1:], reduction="sum").item()
                )
            if progress:
                progress(name, begin + len(ids), len(windows))
        results.append(TextPerplexity(name, windows[:, 1:].numel(), math.fsum(losses)))
    return PerplexityReport(texts[0][1].shape[1], tuple(results))
