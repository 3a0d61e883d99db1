"""The seam to transformers: a quantizer plugin that puts our modules into a model before its
weights are loaded.

It works from transformers 5.3 on without a copy of modeling code: transformers builds the model,
reads the trunk, ties, moves and casts; only the expert and attention modules are ours
(docs/design.md, "Loader").
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from formats.artifact import Artifact
from formats.errors import FormatError, MoeConvertError
from formats.packing import tile_packing_named
from loader.arithmetic.backend import Backend
from loader.experts.cache import ExpertCache
from loader.hf.loading.index_comparison import check_experts, check_matrix, check_no_experts_left
from loader.hf.modules.head import NativeHead
from loader.hf.modules.packed_modules import CachedExperts, PackedLinear

METHOD = "moe_convert"


@dataclass(frozen=True)
class Parts:
    """What goes into the model that is being loaded. backend: of the trunk; experts: of each
    layer's experts.
    """

    artifact: Artifact
    cache: ExpertCache
    backend: Backend
    experts: Sequence[Backend]


_PARTS: ContextVar[Parts | None] = ContextVar("moe_convert_parts", default=None)


@contextmanager
def loading(parts: Parts) -> Iterator[None]:
    """Inside, this thread's `from_pretrained` builds its model of `parts`. Registers the plugin
    where it is not yet.
    """
    register_plugin()
    token = _PARTS.set(parts)
    try:
        yield
    finally:
        _PARTS.reset(token)


def register_plugin() -> None:
    """Make transformers know our quant_method, where it does not yet."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(MoeConvertConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(MoeConvertQuantizer)


def _parts() -> Parts:
    parts = _PARTS.get()
    if parts is None:
        raise MoeConvertError(
            "this is a folder that moe-convert wrote", "load it by loader.from_pretrained(folder)"
        )
    return parts


class MoeConvertConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """config.json's `quantization_config`, carried as it is."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)
        self.quant_method = METHOD


class MoeConvertQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps modules; the weights are packed already, so that there is nothing to convert."""

    requires_calibration = False
    _is_trainable = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        _parts()

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        parts = _parts()
        self._is_trainable = parts.backend.for_gradients is not None
        with torch.device("meta"):
            _swap_modules(model, parts)
        compare_with_trunk(model, parts.artifact)
        # Fillers keep the file free of holes; they are nobody's weights.
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        model._keys_to_ignore_on_load_unexpected = _Patterns([*ignored, r"^__pad__\."])  # type: ignore[assignment]
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        """True where gradients go through the packed weights: transformers' Trainer then takes the
        model with adapters on it, and without any refuses it all the same.
        """
        return self._is_trainable


class _Patterns(list[str]):
    """Patterns to ignore: transformers 5.0 adds a list to them, later versions join a set."""

    def __or__(self, other: Any) -> set[str]:
        return {*self, *other}

    __ror__ = __or__


def _swap_modules(model: nn.Module, parts: Parts) -> None:
    artifact = parts.artifact
    head: Any = model.lm_head
    if parts.backend.name == "native" and type(head) is nn.Linear and head.bias is None:
        _replace(model, "lm_head", NativeHead(head.in_features, head.out_features, bias=False))
    for name, linear in artifact.index.trunk.packed.items():
        packing = tile_packing_named(linear.packing, name)
        check_matrix(model, name, linear, artifact)
        _replace(model, name, PackedLinear(packing, linear.rows, linear.columns, parts.backend))
    for layer, path in enumerate(artifact.architecture.expert_modules):
        check_experts(model, path, artifact)
        layouts = {
            e: artifact.layout(layer, e) for e in range(artifact.architecture.num_local_experts)
        }
        experts = CachedExperts(layer, layouts, parts.cache, parts.experts[layer])
        _replace(model, path, experts)
    check_no_experts_left(model, artifact)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def compare_with_trunk(model: nn.Module, artifact: Artifact) -> None:
    """FormatError naming what differs between the tensors that `model` has and those of the trunk.

    transformers would give random values to a tensor that the file lacks, and only print a table.
    """
    where = artifact.folder / artifact.index.trunk.file
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if artifact.architecture.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
    found = {
        n: e.shape
        for n, e in artifact.trunk_header().entries.items()
        if not n.startswith("__pad__.")
    }
    if missing := sorted(wanted.keys() - found.keys()):
        raise FormatError(
            f"{where}: {len(missing)} tensors that the model needs are missing: {', '.join(missing[:4])}"
        )
    if extra := sorted(found.keys() - wanted.keys()):
        raise FormatError(
            f"{where}: {len(extra)} tensors that the model does not have: {', '.join(extra[:4])}"
        )
    for name, shape in wanted.items():
        if found[name] != shape:
            raise FormatError(
                f"{where}: tensor {name} has shape {list(found[name])}, the model needs {list(shape)}"
            )
