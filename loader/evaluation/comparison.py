"""Compares two models: KL, perplexity ratio, agreement of first choices and of routers."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from formats.errors import MoeConvertError
from formats.prediction import Prediction
from formats.progress import Progress
from formats.quality import Comparison
from loader.hf.modules.expert_layers import experts_modules
from loader.hf.required_cache import window_arguments

POSITIONS_AT_ONCE = 256
"""Positions whose logits are in memory: 33 MB for each model with a vocabulary of 32000."""


@dataclass(frozen=True)
class Text:
    """A text to score: its name, the sha256 of its bytes, and its windows, int64 [n, window]."""

    name: str
    sha256: str
    windows: Tensor


@torch.inference_mode()
def model_predictions(model: Any, windows: Tensor, batch: int) -> Iterator[Prediction]:
    """Yield the prediction for each of `windows`, int64 [n, window].

    model: a causal language model of transformers. batch: windows that one forward pass computes;
    their tokens share the experts that are read.
    """
    for ids in torch.split(windows, batch):
        with _RouterChoices(model) as choices:
            output = model.model(input_ids=ids.to(model.device), **window_arguments(model))
        hidden = output.last_hidden_state
        # [layers, windows, window, k]: the routers see the windows of a batch one after the other.
        routers = torch.stack(choices.by_layer)
        routers = routers.view(len(routers), *ids.shape, -1)
        for row in range(len(ids)):
            yield Prediction(partial(_logits, model.lm_head, hidden[row]), routers[:, row])


@torch.inference_mode()
def compare(
    original: Iterable[Prediction],
    model: Iterable[Prediction],
    texts: list[Text],
    progress: Progress | None = None,
) -> tuple[list[Comparison], Comparison]:
    """Return (the comparison of each text, the comparison of all texts, named "overall").

    original, model: predictions of the texts' windows, in order. All tokens of a window but the
    first are scored. The KL is summed from differences of log-probabilities in float32, because a
    difference of two large sums would lose digits.
    Raises MoeConvertError if a prediction is infinite or NaN.
    """
    pairs = zip(original, model, strict=True)
    measured: list[tuple[Tensor, Tensor]] = []
    for text in texts:
        rows, routers = [], []
        for number, ids in enumerate(text.windows):
            ours, theirs = next(pairs)
            rows.append(_window(ours.logits, theirs.logits, ids))
            routers.append(_same_experts(ours.routers, theirs.routers))
            if not bool(torch.isfinite(rows[-1]).all()):
                raise MoeConvertError(
                    f"{text.name}, window {number}: one model's predictions are infinite or NaN",
                    "moe-convert verify FOLDER --read-data  # for each converted folder",
                )
            if progress:
                progress(text.name, number + 1, len(text.windows))
        measured.append((torch.stack(rows), torch.stack(routers)))
    single = [
        _summary(text.name, text.sha256, *parts, text.windows.shape[1] - 1)
        for text, parts in zip(texts, measured, strict=True)
    ]
    all_rows, all_routers = (torch.cat(parts) for parts in zip(*measured, strict=True))
    return single, _summary("overall", None, all_rows, all_routers, texts[0].windows.shape[1] - 1)


def _same_experts(original: Tensor, model: Tensor) -> Tensor:
    """Return the share of positions where both routers chose the same experts, float64 [layers].

    original, model: choices by rank, int64 [layers, window, k]. If one model uses fewer experts,
    only as many of the other's best choices count.
    """
    ranks = min(original.shape[-1], model.shape[-1])
    ours, theirs = (choices[..., :ranks].sort(-1).values for choices in (original, model))
    return (ours == theirs).all(-1).double().mean(-1)


def _window(
    original: Callable[[int, int], Tensor], model: Callable[[int, int], Tensor], ids: Tensor
) -> Tensor:
    """Return means over a window's scored tokens, float64 [4].

    They are the KL, the original's and the model's negative log-likelihood, and the agreement.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    scored = len(ids) - 1
    for begin in range(0, scored, POSITIONS_AT_ONCE):
        end = min(begin + POSITIONS_AT_ONCE, scored)
        p, q = (torch.log_softmax(logits(begin, end), -1) for logits in (original, model))
        following = ids[begin + 1 : end + 1, None]
        sums += torch.stack(
            [
                (p.exp() * (p - q)).sum(-1).double().sum(),
                -p.gather(-1, following).double().sum(),
                -q.gather(-1, following).double().sum(),
                (p.argmax(-1) == q.argmax(-1)).double().sum(),
            ]
        )
    return sums / scored


def _summary(
    name: str, sha256: str | None, rows: Tensor, routers: Tensor, tokens: int
) -> Comparison:
    n = len(rows)
    kl, original, model, agreement = rows.mean(0).tolist()
    logs = rows[:, 2] - rows[:, 1]
    errors = [float(x.std()) / math.sqrt(n) if n > 1 else None for x in (logs, rows[:, 0])]
    return Comparison(
        name=name,
        windows=n,
        tokens=n * tokens,
        perplexity=_exp(name, model),
        original_perplexity=_exp(name, original),
        ratio=_exp(name, float(logs.mean())),
        ratio_error=errors[0],
        kl=kl,
        kl_error=errors[1],
        agreement=agreement,
        routers=routers.mean(0).tolist(),
        sha256=sha256,
    )


def _exp(name: str, x: float) -> float:
    # exp overflows a float above 709.
    if x > 700:
        raise MoeConvertError(
            f"{name}: a mean negative log-likelihood or its difference is {x:.0f} nats;"
            " one of the models is broken",
            "moe-convert verify FOLDER --read-data  # for each converted folder",
        )
    return math.exp(x)


def _logits(head: Any, hidden: Tensor, begin: int, end: int) -> Tensor:
    logits: Tensor = head(hidden[begin:end])
    return logits.float().cpu()


class _RouterChoices:
    """Collects the experts that tokens use while the context is open.

    by_layer: chosen experts, int64 [tokens, k], for each layer in order.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.by_layer: list[Tensor] = []
        self._handles: list[Any] = []

    def __enter__(self) -> "_RouterChoices":
        for experts in experts_modules(self._model).values():
            self._handles.append(experts.register_forward_pre_hook(self._hook))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, _module: Any, inputs: Any) -> None:
        _, chosen, _ = inputs
        self.by_layer.append(chosen.cpu())
