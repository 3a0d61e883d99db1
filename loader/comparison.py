"""How far a model's predictions are from another's: KL, perplexity ratio, agreement of the first choice."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from formats.errors import MoeConvertError
from loader.perplexity import Progress, windows_of


@dataclass(frozen=True)
class Comparison:
    """One text's result, over windows; each `_error` is the standard error of the number before it.

    kl: mean over tokens of KL(original || model), nats. log_ratio: of the perplexities. agreement: share of tokens at
    which both have the same first choice. routers: per layer, share of the original's experts that the model chooses
    too; None where either does not tell.
    """

    name: str
    tokens: int
    kl: float
    kl_error: float
    log_ratio: float
    log_ratio_error: float
    agreement: float
    routers: list[float] | None

    @property
    def ratio(self) -> float:
        """The model's perplexity over the original's."""
        return math.exp(self.log_ratio)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "ratio": self.ratio}


@torch.inference_mode()
def compare_models(
    original: Any,
    model: Any,
    tokenizer: Any,
    texts: Iterable[tuple[str, str]],
    *,
    window: int = 256,
    max_windows: int | None = None,
    progress: Progress | None = None,
) -> list[Comparison]:
    """A `Comparison` for each (name, text), and one called "overall"; windows as in `measure_perplexity`.

    The KL is summed from differences of log-probabilities in float32, never as a difference of two large sums.
    MoeConvertError if the vocabularies differ, or a text is shorter than a window.
    """
    parts: list[tuple[str, Tensor, list[Tensor]]] = []
    with _Choices(original) as first, _Choices(model) as second:
        for name, text in texts:
            windows = windows_of(tokenizer, text, window, max_windows)
            if not len(windows):
                raise MoeConvertError(
                    f"{name}: shorter than a window of {window} tokens", "give a longer text or a smaller window"
                )
            rows, routers = [], []
            for number, ids in enumerate(windows):
                p, q = (_log_probabilities(m, ids) for m in (original, model))
                if p.shape != q.shape:
                    raise MoeConvertError(
                        f"the original has a vocabulary of {p.shape[1]}, the model of {q.shape[1]}",
                        "name the checkpoint that was converted",
                    )
                wanted = ids[1:, None]
                rows.append(
                    torch.stack(
                        [
                            (p.exp() * (p - q)).sum(1).mean(),
                            (p.gather(1, wanted) - q.gather(1, wanted)).mean(),
                            (p.argmax(1) == q.argmax(1)).float().mean(),
                        ]
                    )
                )
                routers.append(_overlap(first.take(), second.take()))
                if progress:
                    progress(name, number + 1, len(windows))
            parts.append((name, torch.stack(rows).double(), [r for r in routers if r is not None]))
    whole = ("overall", torch.cat([rows for _, rows, _ in parts]), [r for _, _, routers in parts for r in routers])
    return [_summary(*part, window - 1) for part in (*parts, whole)]


def _summary(name: str, rows: Tensor, routers: list[Tensor], tokens: int) -> Comparison:
    n = len(rows)
    mean = rows.mean(0).tolist()
    error = (rows.std(0) / n**0.5).tolist() if n > 1 else [math.nan] * 3
    shared = torch.stack(routers).mean(0).tolist() if len(routers) == n else None
    return Comparison(name, n * tokens, mean[0], error[0], mean[1], error[1], mean[2], shared)


def _log_probabilities(model: Any, ids: Tensor) -> Tensor:
    """float32 [tokens - 1, vocabulary]"""
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    return torch.log_softmax(logits.float(), -1)


def _overlap(original: list[Tensor], model: list[Tensor]) -> Tensor | None:
    """Per layer, the share of the original's experts among the model's; None where they cannot be compared."""
    if not original or [o.shape for o in original] != [m.shape for m in model]:
        return None
    pairs = zip(original, model, strict=True)
    return torch.stack([(o[:, :, None] == m[:, None, :]).any(2).float().mean() for o, m in pairs])


class _Choices:
    """The experts that each layer's router chooses, int64 [tokens, chosen], of calls since the last `take`."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._found: list[Tensor] = []
        self._handles: list[Any] = []

    def __enter__(self) -> "_Choices":
        for name, module in self._model.named_modules():
            if name.endswith(".mlp.gate"):
                self._handles.append(module.register_forward_hook(self._hook))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def take(self) -> list[Tensor]:
        """What was chosen, layer by layer."""
        found, self._found = self._found, []
        return found

    def _hook(self, _module: Any, _inputs: Any, output: Any) -> None:
        if isinstance(output, tuple) and output[-1].dtype == torch.int64:
            self._found.append(output[-1])
