"""The weights and settings that a decoder reads, and a signature that shows their changes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from formats.expert import ExpertLayout
from loader.arithmetic.kernels import PackedMatrix


@dataclass(frozen=True)
class AttentionWeights:
    """The four packed matrices of a layer's attention.

    Their `tiles` are uint8, contiguous and on the decoder's device.
    """

    q: PackedMatrix
    k: PackedMatrix
    v: PackedMatrix
    o: PackedMatrix


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer.

    attention_norm, experts_norm: [hidden]; router: [experts, hidden]; both contiguous and of the
    activations' dtype. layouts: layout of each expert.
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
        """Number of experts in the layer."""
        return self.router.shape[0]

    @property
    def layout(self) -> ExpertLayout | None:
        """Layout of all experts; None if they have several, or plain rows."""
        kinds = set(self.layouts.values())
        layout = kinds.pop() if len(kinds) == 1 else None
        return layout if layout is not None and layout.is_tiled else None


@dataclass(frozen=True)
class ModelWeights:
    """A whole model.

    embedding: [vocabulary, hidden]; norm, the final norm: [hidden]; both contiguous and of the
    activations' dtype.
    head: bfloat16 [rows, hidden], or packed, or None if it stays a torch module.
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
    """Addresses of weights and values of settings, compared before each token.

    Decoders read weights in place, so changes in place need no comparison. They keep the memory
    alive, so a replaced weight has another address. A place is the dict in which a module keeps its
    parameters, buffers or settings: torch's attribute lookup searches three of them in Python.
    """

    def __init__(self) -> None:
        self._tensors: list[tuple[Mapping[str, Any], str]] = []
        self._absent: list[tuple[Mapping[str, Any], str]] = []
        self._settings: list[tuple[Mapping[str, Any], str]] = []

    def add_tensor(self, place: Mapping[str, Any], name: str) -> None:
        """Include a tensor's address, shape and strides."""
        self._tensors.append((place, name))

    def add_absent(self, place: Mapping[str, Any], name: str) -> None:
        """Include that a tensor is None or missing."""
        self._absent.append((place, name))

    def add_setting(self, place: Mapping[str, Any], name: str) -> None:
        """Include a number."""
        self._settings.append((place, name))

    def now(self) -> list[Any]:
        """Return the present values. KeyError or AttributeError if a tensor was removed."""
        values: list[Any] = [place[name] for place, name in self._settings]
        for place, name in self._tensors:
            tensor = place[name]
            values += tensor.data_ptr(), tensor.shape, tensor.stride()
        values += [place.get(name) is None for place, name in self._absent]
        return values
