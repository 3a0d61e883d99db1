"""Listens to a model's experts: which ones tokens use, and what the next layer's router would have
guessed.
"""

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
    """The routing of some tokens, as the arrays of `Trace`."""

    experts: NDArray[np.uint8]
    weights: NDArray[np.float16]
    guesses: NDArray[np.uint8]
    guesses_next_norm: NDArray[np.uint8]


class RoutingRecorder:
    """While it is entered, records every forward pass of `model`, a causal language model of
    transformers.

    A guess at layer l is the next layer's router on the input of layer l's experts; with the next
    norm, on the same residual normed with layer l + 1's weight. In float32, best first, `guesses`
    of them. The hooks make packed layers take transformers' code: slower, the same arithmetic for
    many tokens (docs/numerics.md).
    """

    def __init__(self, model: Any, guesses: int) -> None:
        layers = routed_layers(model)
        if layers is None:
            raise MoeConvertError(
                f"{type(model).__name__} has no routers to ask for guesses",
                "name a mixture of experts",
            )
        self._layers = layers
        self._guesses = guesses
        self._handles: list[Any] = []
        self._residual: Tensor | None = None
        self._found: list[dict[str, list[Tensor]]] = []

    def __enter__(self) -> "RoutingRecorder":
        self._found = [{} for _ in self._layers]
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
        """What was recorded since the last call, in the order of the forward passes; batches row by
        row.

        MoeConvertError if layers choose different numbers of experts.
        """
        found, self._found = self._found, [{} for _ in self._layers]
        tokens = sum(len(part) for part in found[0]["experts"])
        chosen = sorted({part.shape[1] for layer in found for part in layer["experts"]})
        if len(chosen) > 1:
            raise MoeConvertError(
                f"the routers choose {chosen[0]} to {chosen[-1]} experts a token; a trace has one number",
                "give all routers the same top_k",
            )

        def stacked(name: str, layers: list[dict[str, list[Tensor]]], width: int) -> Any:
            if not layers:
                return np.zeros((tokens, 0, width), np.uint8)
            return torch.stack([torch.cat(layer[name]) for layer in layers], 1).numpy()

        guessing = found[:-1]
        return Routing(
            stacked("experts", found, 0),
            stacked("weights", found, 0),
            stacked("guesses", guessing, self._guesses),
            stacked("guesses_next_norm", guessing, self._guesses),
        )

    def _keep_residual(self, _module: Any, inputs: tuple[Tensor, ...]) -> None:
        self._residual = inputs[0]

    def _note(self, number: int, x: Tensor, experts: Tensor, weights: Tensor) -> None:
        """One call of a layer's experts: x [T, hidden], experts and weights [T, chosen]."""
        found = self._found[number]
        self._add(found, "experts", experts.to(torch.uint8))
        self._add(found, "weights", weights.to(torch.float16))
        if number + 1 < len(self._layers):
            following = self._layers[number + 1]
            self._add(found, "guesses", self._best(x, following))
            if self._residual is None:
                raise MoeConvertError(f"layer {number}: the experts ran without their norm")
            norm = following.norm
            residual = self._residual.float()
            normed = functional.rms_norm(
                residual, residual.shape[-1:], norm.weight.float(), norm.variance_epsilon
            )
            self._add(found, "guesses_next_norm", self._best(normed, following))

    def _best(self, x: Tensor, layer: RoutedLayer) -> Tensor:
        weight = layer.router.weight.float()
        logits = functional.linear(x.reshape(-1, weight.shape[1]).float(), weight)
        return logits.topk(self._guesses, dim=-1).indices.to(torch.uint8)

    @staticmethod
    def _add(found: dict[str, list[Tensor]], name: str, value: Tensor) -> None:
        found.setdefault(name, []).append(value.detach().cpu())
