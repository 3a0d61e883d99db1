"""The model's calls of its decoder layers, recorded by dry runs over stand-ins.

A layer can run alone on any windows only if the windows differ in nothing but the stream. So two
dry runs with different tokens and hidden states must give the same calls, and each layer must get
the output of the layer before it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from formats.errors import SourceError

_PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))

Visit = Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Tensor]
"""Replaces decoder layers: (number, stream, arguments, keywords) → the stream after the layer."""


@dataclass(frozen=True)
class LayerCall:
    """The arguments of a decoder layer after the stream.

    A dimension for windows has size 1: one window stands for all.
    """

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class CallRecorder:
    """Replaces all decoder layers of a model and records their calls."""

    def __init__(self, seed: int, where: str) -> None:
        self.calls: list[LayerCall] = []
        self._where = where
        self._random = torch.Generator().manual_seed(seed)
        self._returned: list[Tensor] = []

    def visit(
        self, number: int, stream: Tensor, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> Tensor:
        """Record a call and return random hidden states.

        SourceError if another layer is expected, or if the model changed the output of the layer
        before.
        """
        if number != len(self.calls):
            raise cannot_run_alone(
                self._where,
                f"decoder layer {number} is called where layer {len(self.calls)} is expected",
            )
        if self._returned and stream is not self._returned[-1]:
            raise cannot_run_alone(
                self._where,
                f"the model changes the hidden states between layers {number - 1} and {number}",
            )
        self.calls.append(LayerCall(arguments, keywords))
        # One random number per token, expanded along the hidden dimension: it takes no memory.
        drawn = torch.randn(*stream.shape[:-1], 1, generator=self._random).expand(stream.shape)
        self._returned = [drawn]
        return drawn


def compare_calls(calls: list[LayerCall], others: list[LayerCall], where: str) -> None:
    """Raise SourceError unless two dry runs called the layers with the same arguments."""
    for number, (one, other) in enumerate(zip(calls, others, strict=True)):
        _compare(one.arguments, other.arguments, f"decoder layer {number}: an argument", where)
        _compare(one.keywords, other.keywords, f"decoder layer {number}: argument", where)


def _compare(one: Any, other: Any, what: str, where: str) -> None:
    """Raise SourceError if two values of argument `what` differ."""
    depends = f"{what} depends on tokens or hidden states"
    if type(one) is not type(other):
        types = f"{type(one).__name__} for some tokens, {type(other).__name__} for others"
        raise cannot_run_alone(where, f"{what} is of type {types}")
    if isinstance(one, Tensor):
        if one.shape != other.shape or not torch.equal(one, other):
            raise cannot_run_alone(where, depends)
    elif isinstance(one, dict):
        if one.keys() != other.keys():
            raise cannot_run_alone(where, depends)
        for key in one:
            _compare(one[key], other[key], f"{what} {key}", where)
    elif isinstance(one, (tuple, list)):
        if len(one) != len(other):
            raise cannot_run_alone(where, depends)
        for pair in zip(one, other, strict=True):
            _compare(*pair, what, where)
    elif not isinstance(one, _PLAIN):
        raise cannot_run_alone(where, f"{what} is a {type(one).__name__}, which layers may change")
    elif one != other:
        raise cannot_run_alone(where, depends)


def cannot_run_alone(where: str, reason: str) -> SourceError:
    """Return the error of a model whose layers cannot run alone. where: path of config.json."""
    return SourceError(
        f"{where}: its layers cannot run one at a time: {reason}",
        "convert with --calibrate none, which runs no layer; eval needs a model whose layers can"
        " run alone",
    )
