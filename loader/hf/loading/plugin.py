"""A quantizer plugin for transformers that replaces modules before the weights are loaded.

transformers builds the model, reads the trunk, and ties, moves and casts its weights. The plugin
replaces only experts, packed linear layers and the output head, so no modeling code is copied
(docs/design.md, "Loader").
"""

import re
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
from formats.config.recorded_config import METHOD
from formats.errors import MoeConvertError
from formats.layer_file import FILLER_PREFIX
from formats.packing import tile_packing_named
from loader.arithmetic.backend import Backend
from loader.experts.cache import ExpertCache
from loader.hf.loading.index_comparison import (
    check_experts,
    check_matrix,
    check_no_experts_left,
    check_trunk,
)
from loader.hf.modules.head import NativeHead
from loader.hf.modules.packed_modules import CachedExperts, PackedLinear
from loader.hf.private_names import ignore_unexpected, replaces_modules, skip_initialization


@dataclass(frozen=True)
class Parts:
    """The parts of the model that is being loaded.

    backend: computes the trunk's products. experts: backend of each layer's experts.
    """

    artifact: Artifact
    cache: ExpertCache
    backend: Backend
    experts: Sequence[Backend]


_PARTS: ContextVar[Parts | None] = ContextVar("moe_convert_parts", default=None)


@contextmanager
def use_parts(parts: Parts) -> Iterator[None]:
    """Make from_pretrained use `parts` in this context (a thread or task). Registers the plugin."""
    register_plugin()
    token = _PARTS.set(parts)
    try:
        yield
    finally:
        _PARTS.reset(token)


def register_plugin() -> None:
    """Add the quant_method of converted folders to transformers' registries, once."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(MoeConvertConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(MoeConvertQuantizer)


def _parts() -> Parts:
    parts = _PARTS.get()
    if parts is None:
        raise MoeConvertError(
            "transformers cannot load a converted folder by itself",
            "load it by loader.from_pretrained(folder)",
        )
    return parts


class MoeConvertConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The field quantization_config of config.json, unchanged."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)
        self.quant_method = METHOD


@replaces_modules
class MoeConvertQuantizer(HfQuantizer):  # type: ignore[misc]
    """Replaces modules. It converts no weights: they are packed already."""

    requires_calibration = False
    _is_trainable = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        _parts()

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        """True if gradients pass through the packed weights.

        transformers' Trainer then accepts the model if it has adapters.
        """
        return self._is_trainable

    def replace_modules(self, model: nn.Module) -> None:
        """Replace the modules of a model on the meta device, and compare it with the folder.

        Raises FormatError if model and folder differ.
        """
        parts = _parts()
        self._is_trainable = parts.backend.for_gradients is not None
        with torch.device("meta"):
            _replace_modules(model, parts)
        check_trunk(model, parts.artifact)
        ignore_unexpected(model, rf"^{re.escape(FILLER_PREFIX)}")


def _replace_modules(model: nn.Module, parts: Parts) -> None:
    artifact = parts.artifact
    head: Any = model.lm_head
    if parts.backend.name == "native" and type(head) is nn.Linear and head.bias is None:
        _replace(model, "lm_head", NativeHead(head.in_features, head.out_features, bias=False))
    for name, linear in artifact.index.trunk.packed.items():
        packing = tile_packing_named(linear.packing, name)
        check_matrix(model, name, linear, artifact)
        module = PackedLinear(packing, linear.rows, linear.columns, parts.backend)
        skip_initialization(module)
        _replace(model, name, module)
    for layer, path in enumerate(artifact.architecture.expert_modules):
        check_experts(model, path, artifact)
        layouts = {
            expert: artifact.layout(layer, expert)
            for expert in range(artifact.architecture.num_local_experts)
        }
        experts = CachedExperts(layer, layouts, parts.cache, parts.experts[layer])
        _replace(model, path, experts)
    check_no_experts_left(model, artifact)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
