"""Changes of one tensor's rows by an adapter, computed by PEFT's layers on these rows alone."""

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

ADAPTER = "default"
"""Name of the only adapter in PEFT's layers."""

MIN_ROWS = 32
"""Fewer rows go through other kernels of a BLAS, and then have other bits than in the whole matrix.
Measured with MKL: all of 4,000 slices of 32 rows or more were equal, of 1 and 7 rows they were not.
"""

MERGED_AT_ONCE = 4 << 20
"""Numbers of a tensor that are merged at once. PEFT has two float32 for each."""


class Change(Protocol):
    """A change of one tensor. Several threads may use it."""

    def apply(self, rows: Tensor, begin: int) -> Tensor:
        """Return the changed rows in the same dtype; `rows` may be overwritten.

        rows: [n, ...] from row `begin` of the tensor on; n is at least MIN_ROWS, or all rows.
        """


@dataclass(frozen=True)
class Replacement:
    """The tensor is replaced: of a module of `modules_to_save`, a stored embedding, or a bias."""

    values: Tensor

    def apply(self, rows: Tensor, begin: int) -> Tensor:
        # A copy: the next change may be made in place.
        return self.values[begin : begin + len(rows)].to(rows.dtype, copy=True)


@dataclass(frozen=True)
class LinearChange:
    """LoRA or DoRA on the weight of a linear layer, or LoRA on any matrix of the trunk.

    layer: PEFT's layer.
    """

    layer: Any
    parameter: str

    def apply(self, rows: Tensor, begin: int) -> Tensor:
        end = begin + len(rows)
        part = _part(self.layer, rows, self.parameter)
        _put(part, "lora_B", _product(self.layer.lora_B[ADAPTER].weight[begin:end]))
        if ADAPTER in self.layer.lora_magnitude_vector:
            magnitude = copy.copy(self.layer.lora_magnitude_vector[ADAPTER])
            magnitude._parameters = {"weight": _fixed(magnitude.weight[begin:end])}
            magnitude._dora_cache = {}
            _put(part, "lora_magnitude_vector", magnitude)
        return _merged(part, self.parameter)


@dataclass(frozen=True)
class EmbeddingChange:
    """LoRA on an embedding, whose rows are the columns of the product."""

    layer: Any

    def apply(self, rows: Tensor, begin: int) -> Tensor:
        part = _part(self.layer, rows, "weight")
        columns = self.layer.lora_embedding_A[ADAPTER][:, begin : begin + len(rows)]
        part._modules["lora_embedding_A"] = nn.ParameterDict({ADAPTER: _fixed(columns)})
        return _merged(part, "weight")


@dataclass(frozen=True)
class ExpertChange:
    """LoRA on a parameter of all experts [experts, rows, columns]: the part of one expert.

    first_row: row of the parameter where the expert's projection begins.
    """

    layer: Any
    expert: int
    first_row: int

    def apply(self, rows: Tensor, begin: int) -> Tensor:
        layer = self.layer
        a = layer.lora_A[ADAPTER].weight
        b = layer.lora_B[ADAPTER].weight
        begin += self.first_row
        # PEFT stores all experts' A one below the other, and the columns of B by rank, then expert.
        a = a.reshape(layer.num_experts, -1, a.shape[1])[self.expert]
        b = b.reshape(b.shape[0], -1, layer.num_experts)[begin : begin + len(rows), :, self.expert]
        part = _part(layer, rows, layer.parameter_name)
        part.num_experts = 1
        _put(part, "lora_A", _product(a))
        _put(part, "lora_B", _product(b.contiguous()))
        return _merged(part, layer.parameter_name)


def _part(layer: Any, rows: Tensor, parameter: str) -> Any:
    """Return a copy of PEFT's layer whose base layer has these rows alone."""
    part = copy.copy(layer)
    part._modules = dict(layer._modules)
    part.merged_adapters = []
    part._caches = {}
    base: Any = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
    base._parameters = {parameter: _fixed(rows)}
    part._modules["base_layer"] = base
    return part


def _merged(part: Any, parameter: str) -> Tensor:
    """Merge in PEFT's layer `part`; return its base layer's rows."""
    base = part._modules["base_layer"]
    with torch.no_grad():
        part.merge(safe_merge=False, adapter_names=[ADAPTER])
    merged: Tensor = base._parameters[parameter].data
    return merged


def _put(part: Any, name: str, module: nn.Module) -> None:
    part._modules[name] = nn.ModuleDict({ADAPTER: module})


def _product(weight: Tensor) -> nn.Module:
    """Return a linear layer with this weight."""
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = _fixed(weight)
    return module


def _fixed(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach(), requires_grad=False)
