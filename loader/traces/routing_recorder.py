"""Records a model's routing, and what the next layer's router would have guessed."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from formats.errors import MoeConvertError
from loader.hf.modules.expert_layers import RoutedLayer, routed_layers


@dataclass(frozen=True)
class Routing:
    """Routing of some tokens; the arrays are those of `Trace`."""

    experts: NDArray[np.uint8]
    weights: NDArray[np.float16]
    guesses: NDArray[np.uint8]
    guesses_next_norm: NDArray[np.uint8]


class RoutingRecorder:
    """Records all forward passes of a causal language model of transformers, as a context manager.

    The guesses at layer l come from the router of layer l + 1 on the input of layer l's experts;
    those "with the next norm" from the same residual, normed with the weight of layer l + 1. They
    are computed in float32, `guesses` of them, best first. While hooks are set, packed layers take
    transformers' code, which is slower but has the same arithmetic for many tokens
    (docs/numerics.md).
    """

    def __init__(self, model: Any, guesses: int) -> None:
        layers = routed_layers(model)
        if layers is None:
            raise MoeConvertError(
                f"{type(model).__name__} has no routers whose choices can be recorded",
                "name a mixture-of-experts model",
            )
        self._layers = layers
        self._guesses = guesses
        self._handles: list[Any] = []
        self._residual: Tensor | None = None
        self._recorded: list[dict[str, list[Tensor]]] = []

    def __enter__(self) -> "RoutingRecorder":
        self._recorded = [{} for _ in self._layers]
        for number, layer in enumerate(self._layers):
            self._handles.append(layer.norm.register_forward_pre_hook(self._keep_residual))
            self._handles.append(
                layer.experts.register_forward_pre_hook(
                    lambda _, inputs, number=number: self._note(number, *inputs)
                )
            )
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._residual = [], None

    def take(self) -> Routing:
        """Return what was recorded since the last call, in the order of passes, batches row by row.

        Raises MoeConvertError if layers choose different numbers of experts.
        """
        recorded = self._recorded
        self._recorded = [{} for _ in self._layers]
        tokens = sum(len(part) for part in recorded[0]["experts"])
        chosen = sorted({part.shape[1] for layer in recorded for part in layer["experts"]})
        if len(chosen) > 1:
            raise MoeConvertError(
                f"the routers choose {chosen[0]} to {chosen[-1]} experts for a token;"
                " a trace needs one number",
                "give all routers the same top_k",
            )

        def stacked(name: str, layers: list[dict[str, list[Tensor]]], width: int) -> Any:
            if not layers:
                return np.zeros((tokens, 0, width), np.uint8)
            return torch.stack([torch.cat(layer[name]) for layer in layers], 1).numpy()

        guessing = recorded[:-1]
        return Routing(
            stacked("experts", recorded, 0),
            stacked("weights", recorded, 0),
            stacked("guesses", guessing, self._guesses),
            stacked("guesses_next_norm", guessing, self._guesses),
        )

    def _keep_residual(self, _module: Any, inputs: tuple[Tensor, ...]) -> None:
        self._residual = inputs[0]

    def _note(self, number: int, x: Tensor, experts: Tensor, weights: Tensor) -> None:
        """Record one call of a layer's experts: x [T, hidden], experts and weights [T, chosen]."""
        recorded = self._recorded[number]
        self._add(recorded, "experts", experts.to(torch.uint8))
        self._add(recorded, "weights", weights.to(torch.float16))
        if number + 1 < len(self._layers):
            following = self._layers[number + 1]
            self._add(recorded, "guesses", self._best(x, following))
            if self._residual is None:
                raise MoeConvertError(f"layer {number}: the experts ran without their norm")
            norm = following.norm
            residual = self._residual.float()
            normed = functional.rms_norm(
                residual, residual.shape[-1:], norm.weight.float(), norm.variance_epsilon
            )
            self._add(recorded, "guesses_next_norm", self._best(normed, following))

    def _best(self, x: Tensor, layer: RoutedLayer) -> Tensor:
        weight = layer.router.weight.float()
        logits = functional.linear(x.reshape(-1, weight.shape[1]).float(), weight)
        return logits.topk(self._guesses, dim=-1).indices.to(torch.uint8)

    @staticmethod
    def _add(recorded: dict[str, list[Tensor]], name: str, value: Tensor) -> None:
        recorded.setdefault(name, []).append(value.detach().cpu())
