"""The weights and settings that a decoder reads, and the signature that tells when one of them has
changed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from formats.expert import ExpertLayout
from loader.arithmetic.kernels import PackedMatrix


@dataclass(frozen=True)
class AttentionWeights:
    """The four packed matrices of a layer's attention; each `tiles` uint8, contiguous, on the
    decoder's device.
    """

    q: PackedMatrix
    k: PackedMatrix
    v: PackedMatrix
    o: PackedMatrix


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer.

    attention_norm, experts_norm [hidden] and router [experts, hidden]: contiguous, of the
    activations' dtype.
    """

    attention: AttentionWeights
    head_dim: int
    scale: float
    attention_norm: Tensor
    attention_eps: float
    experts_norm: Tensor
    experts_eps: float
    router: Tensor
    top_k: int
    layouts: dict[int, ExpertLayout]

    @property
    def experts(self) -> int:
        """Number of experts that the router chooses from."""
        return self.router.shape[0]

    @property
    def layout(self) -> ExpertLayout | None:
        """The layout of all experts; None if they have several, or one that is not of tiles."""
        kinds = set(self.layouts.values())
        layout = kinds.pop() if len(kinds) == 1 else None
        return layout if layout is not None and layout.is_tiled else None


@dataclass(frozen=True)
class ModelWeights:
    """A whole model.

    embedding [vocabulary, hidden], norm [hidden]: contiguous, of the activations' dtype. head:
    bfloat16 [rows, hidden], packed, or None where it stays a module of torch.
    """

    layers: tuple[LayerWeights, ...]
    embedding: Tensor
    norm: Tensor
    eps: float
    head: Tensor | PackedMatrix | None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations."""
        return self.embedding.dtype

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.embedding.shape[1]


class Signature:
    """Where weights lie and what settings are, to be compared before each token.

    Decoders read weights in place, so a change in place needs no comparison, and keep their memory
    alive, so that a new weight has another address. Places are the dicts in which modules keep
    their parameters, buffers and settings: torch's own attribute lookup searches three of them in
    Python.
    """

    def __init__(self) -> None:
        self._tensors: list[tuple[Mapping[str, Any], str]] = []
        self._absent: list[tuple[Mapping[str, Any], str]] = []
        self._settings: list[tuple[Mapping[str, Any], str]] = []

    def add_tensor(self, place: Mapping[str, Any], name: str) -> None:
        """Compare the address, shape and strides of a tensor."""
        self._tensors.append((place, name))

    def add_absent(self, place: Mapping[str, Any], name: str) -> None:
        """Compare that there is no such tensor."""
        self._absent.append((place, name))

    def add_setting(self, place: Mapping[str, Any], name: str) -> None:
        """Compare a number."""
        self._settings.append((place, name))

    def now(self) -> list[Any]:
        """Return the present values. KeyError or AttributeError if a tensor is no longer there."""
        values: list[Any] = [place[name] for place, name in self._settings]
        for place, name in self._tensors:
            tensor = place[name]
            values += tensor.data_ptr(), tensor.shape, tensor.stride()
        values += [place.get(name) is None for place, name in self._absent]
        return values
