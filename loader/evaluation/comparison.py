"""How far a model's predictions are from another's: KL, perplexity ratio, agreement of first choice
and of routers.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from formats.errors import MoeConvertError
from formats.prediction import Prediction
from formats.quality import Comparison
from loader.evaluation.perplexity import Progress
from loader.hf.modules.expert_layers import experts_modules

POSITIONS_AT_ONCE = 256
"""Whose logits are in memory: 33 MB a model for a vocabulary of 32000."""


@dataclass(frozen=True)
class Text:
    """A text's name, the sha256 of its bytes, and its windows, int64 [n, window]."""

    name: str
    sha256: str
    windows: Tensor


@torch.inference_mode()
def model_predictions(model: Any, windows: Tensor, batch: int) -> Iterator[Prediction]:
    """The predictions of a causal language model of transformers for each of `windows` (int64 [n,
    window]), computed `batch` at a time: its experts are read once for these.
    """
    for ids in torch.split(windows, batch):
        with _Choices(model) as choices:
            hidden = model.model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
        # [layers, windows, window, k]: the routers see the windows of a batch one after the other.
        routers = torch.stack(choices.found)
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
    """(of each text, of all together, by the name "overall"). `original` and `model` predict the
    texts' windows, in order. All but the first token of a window are scored.

    The KL is summed from differences of log-probabilities in float32, never as a difference of two
    large sums. MoeConvertError if a prediction is not finite.
    """
    pairs = zip(original, model, strict=True)
    found: list[tuple[Tensor, Tensor]] = []
    for text in texts:
        rows, routers = [], []
        for number, ids in enumerate(text.windows):
            ours, theirs = next(pairs)
            rows.append(_window(ours.logits, theirs.logits, ids))
            routers.append(_same_experts(ours.routers, theirs.routers))
            if not bool(torch.isfinite(rows[-1]).all()):
                raise MoeConvertError(
                    f"{text.name}, window {number}: the predictions of one of the models are infinite or NaN",
                    "moe-convert verify FOLDER --read-data  # of each of the two",
                )
            if progress:
                progress(text.name, number + 1, len(text.windows))
        found.append((torch.stack(rows), torch.stack(routers)))
    single = [
        _summary(t.name, t.sha256, *f, t.windows.shape[1] - 1)
        for t, f in zip(texts, found, strict=True)
    ]
    rows_of_all, routers_of_all = (torch.cat(parts) for parts in zip(*found, strict=True))
    return single, _summary(
        "overall", None, rows_of_all, routers_of_all, texts[0].windows.shape[1] - 1
    )


def _same_experts(original: Tensor, model: Tensor) -> Tensor:
    """The share of positions where the routers chose the same experts, float64 [layers]; of choices
    by rank, int64 [layers, window, k]. Where one uses fewer experts, the other's first ones count.
    """
    ranks = min(original.shape[-1], model.shape[-1])
    ours, theirs = (choices[..., :ranks].sort(-1).values for choices in (original, model))
    return (ours == theirs).all(-1).double().mean(-1)


def _window(
    original: Callable[[int, int], Tensor], model: Callable[[int, int], Tensor], ids: Tensor
) -> Tensor:
    """Means over a window's scored tokens: KL, both negative log-likelihoods, agreement; float64
    [4].
    """
    sums, scored = torch.zeros(4, dtype=torch.float64), len(ids) - 1
    for begin in range(0, scored, POSITIONS_AT_ONCE):
        end = min(begin + POSITIONS_AT_ONCE, scored)
        p, q = (torch.log_softmax(logits(begin, end), -1) for logits in (original, model))
        wanted = ids[begin + 1 : end + 1, None]
        sums += torch.stack(
            [
                (p.exp() * (p - q)).sum(-1).double().sum(),
                -p.gather(-1, wanted).double().sum(),
                -q.gather(-1, wanted).double().sum(),
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
    if x > 700:
        raise MoeConvertError(
            f"{name}: a mean log-likelihood is {x:.0f} nats off: one of the models is broken"
        )
    return math.exp(x)


def _logits(head: Any, hidden: Tensor, begin: int, end: int) -> Tensor:
    logits: Tensor = head(hidden[begin:end])
    return logits.float().cpu()


class _Choices:
    """Collects the experts that tokens use in each layer, int64 [tokens, k], in `found`."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.found: list[Tensor] = []
        self._handles: list[Any] = []

    def __enter__(self) -> "_Choices":
        for experts in experts_modules(self._model).values():
            self._handles.append(experts.register_forward_pre_hook(self._hook))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, _module: Any, inputs: Any) -> None:
        _, chosen, _ = inputs
        self.found.append(chosen.cpu())
