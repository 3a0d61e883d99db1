"""A model's shape: layers, experts and tensors, as transformers' class defines them."""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from converter.checkpoint.conversion_table import ConversionTable
from converter.checkpoint.experts_probe import FUSED, computes_gated_silu
from converter.checkpoint.names import ExpertTensor, FusedTensor
from formats.config.field_rules import short
from formats.errors import SourceError
from formats.index import Architecture
from formats.trunk import ATTENTION

HEAD = "lm_head"
_PROJECTION_OF_PART = {
    ("gate_up_proj", 0): "gate",
    ("gate_up_proj", 1): "up",
    ("down_proj", 0): "down",
}
_SPELLED_OUT = {("gate_up_proj", 2), ("down_proj", 1)}
"""(fused parameter, tensors per expert) in a checkpoint that stores each expert by itself."""


@dataclass(frozen=True)
class ExpertsModule:
    """The experts of one decoder layer: module path, number of experts, sizes."""

    path: str
    decoder_layer: int
    experts: int
    hidden: int
    intermediate: int


class ModelShape:
    """The model of a checked config.json (formats/config/config_gate.py), on the meta device.

    where: path of config.json, for errors. SourceError if transformers refuses the config, or if
    the experts compute something else than packed experts.
    """

    def __init__(self, config: dict[str, Any], where: str) -> None:
        self._where = where
        self.model = _meta_model(config, where)
        """transformers' causal language model of float32 tensors without memory."""
        self.model_type: str = self.model.config.model_type
        self.experts = tuple(self._find_experts())
        """The experts modules, by expert layer."""
        if not self.experts:
            raise SourceError(
                f"{where}: no layer of {type(self.model).__name__} has experts",
                "use a mixture-of-experts checkpoint",
            )
        layers_path = self.experts[0].path.split(f".{self.experts[0].decoder_layer}.")[0]
        self.decoder_layers = tuple(
            f"{layers_path}.{n}" for n in range(len(self.model.get_submodule(layers_path)))
        )
        """Module path of each decoder layer."""
        self.embedding = self._embedding()
        """Name of the input embedding's weight."""
        self.tied = bool(self.model.config.tie_word_embeddings)
        """True if the head is the embedding."""
        not_trunk = {f"{module.path}.{name}" for module in self.experts for name in FUSED}
        if self.tied:
            not_trunk.add(f"{HEAD}.weight")
        self.trunk: dict[str, tuple[int, ...]] = {
            name: tuple(tensor.shape)
            for name, tensor in self.model.state_dict().items()
            if name not in not_trunk
        }
        """Name -> shape of each of the trunk's tensors, without a tied head."""
        self.linears: dict[str, tuple[int, int]] = {
            name: (module.out_features, module.in_features)
            for name, module in self.model.named_modules()
            if type(module) is nn.Linear and module.bias is None and self._is_packable(name)
        }
        """Module path -> (rows, columns) of each matrix that may be packed."""
        self.architecture = self._architecture(config)
        """The sizes and counts that the index records."""
        self._ordinals = {module.path: layer for layer, module in enumerate(self.experts)}

    def role(self, name: str) -> ExpertTensor | FusedTensor | str | None:
        """Return the role of a checkpoint's tensor; None if transformers does not load it.

        A tensor of the trunk becomes its name there. A tensor that the model lacks keeps its name,
        which is not in `trunk`.
        """
        target = self._table.target(name)
        if target is None:
            return None
        path, _, parameter = target.name.rpartition(".")
        layer = self._ordinals.get(path) if parameter in FUSED else None
        if target.expert is None:
            if layer is None:
                return target.name
            return FusedTensor(layer, parameter.removesuffix("_proj"))
        if layer is None:
            return name
        if (parameter, target.parts) not in _SPELLED_OUT:
            raise SourceError(
                f"{self._where}: tensor {name} becomes {target.name} by a conversion that is not"
                " read",
                "use the original checkpoint",
            )
        return ExpertTensor(layer, target.expert, _PROJECTION_OF_PART[parameter, target.part])

    def experts_layer(self, path: str) -> int | None:
        """Return the expert layer whose experts module is `path`; None for another module."""
        return self._ordinals.get(path)

    def decoder_layer(self, name: str) -> int | None:
        """Return the decoder layer of a tensor or module; None outside of all layers."""
        layers_path = self.decoder_layers[0].rpartition(".")[0]
        match = re.match(re.escape(layers_path) + r"\.([0-9]{1,9})(?:\.|$)", name)
        return int(match[1]) if match else None

    @cached_property
    def _table(self) -> ConversionTable:
        return ConversionTable(self.model, self._where)

    def _is_packable(self, name: str) -> bool:
        if name == HEAD:
            return not self.tied
        return name.rpartition(".")[2] in ATTENTION and self.decoder_layer(name) is not None

    def _embedding(self) -> str:
        embedding = self.model.get_input_embeddings()
        return next(
            f"{path}.weight" for path, module in self.model.named_modules() if module is embedding
        )

    def _architecture(self, config: dict[str, Any]) -> Architecture:
        """Return the model's sizes; SourceError if the layers' experts differ in size or number."""
        architecture = Architecture.of_config(config, [module.path for module in self.experts])
        experts = architecture.num_local_experts
        hidden = architecture.hidden_size
        intermediate = architecture.intermediate_size
        for module in self.experts:
            sizes = (module.experts, module.hidden, module.intermediate)
            if sizes != (experts, hidden, intermediate):
                raise SourceError(
                    f"{self._where}: {module.path} has {module.experts} experts of"
                    f" {module.hidden} and {module.intermediate}, expected are {experts} of"
                    f" {hidden} and {intermediate}",
                    "use a checkpoint whose layers have experts of one size",
                )
        return architecture

    def _find_experts(self) -> Iterator[ExpertsModule]:
        """Yield the experts modules in order; SourceError for one that packing cannot replace."""
        probed: set[type] = set()
        for path, module in self.model.named_modules():
            gate_up, down = (getattr(module, name, None) for name in FUSED)
            if not isinstance(gate_up, nn.Parameter) or not isinstance(down, nn.Parameter):
                continue
            if gate_up.dim() != 3 or down.dim() != 3:
                continue
            experts, hidden, intermediate = down.shape
            is_known = type(module) in probed or computes_gated_silu(module)
            if not is_known or gate_up.shape != (experts, 2 * intermediate, hidden):
                raise SourceError(
                    f"{self._where}: each expert of {path} ({type(module).__name__}) must compute"
                    " down(silu(gate) * up), as packed experts do; it computes something else",
                    "use a checkpoint of one of the model types that README.md lists",
                )
            probed.add(type(module))
            numbers = re.findall(r"\.(\d+)(?=\.|$)", path)
            yield ExpertsModule(path, int(numbers[0]), experts, hidden, intermediate)


def _meta_model(config: dict[str, Any], where: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        fields = copy.deepcopy(config)
        built = AutoConfig.for_model(fields.pop("model_type"), **fields)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                built, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
            )
    # A foreign library raises anything for a stranger's values: TypeError, KeyError,
    # ZeroDivisionError and its own errors.
    except Exception as e:
        raise SourceError(
            f"{where}: transformers refuses it: {type(e).__name__}: {short(str(e))}",
            f"correct {where}",
        ) from e
    # The probe must run the experts' own forward, not a fused kernel.
    model.config._experts_implementation = "eager"
    return model.eval()
