"""What a checkpoint's model is made of: layers, experts, tensors and shapes, as transformers' class
says them.
"""

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
_PROJECTIONS = {("gate_up_proj", 0): "gate", ("gate_up_proj", 1): "up", ("down_proj", 0): "down"}
_SPELLED_OUT = {("gate_up_proj", 2), ("down_proj", 1)}
"""Of how many tensors of a checkpoint an expert's part of a fused parameter is made, where each
expert has its own.
"""


@dataclass(frozen=True)
class ExpertsModule:
    """The experts of one decoder layer: the module's path, and their number and sizes."""

    path: str
    decoder_layer: int
    experts: int
    hidden: int
    intermediate: int


class ModelShape:
    """The model of a gated config.json (formats/config/model_config.py), on the meta device.

    `where` is config.json's path, for errors. SourceError for what transformers refuses, and for
    experts that compute something else than packed ones.
    """

    def __init__(self, config: dict[str, Any], where: str) -> None:
        self._where = where
        self.model = _meta_model(config, where)
        """transformers' causal language model of float32 tensors without memory."""
        self.model_type: str = self.model.config.model_type
        self.experts = tuple(self._find_experts())
        """The experts modules; an expert's layer is the place here."""
        if not self.experts:
            raise SourceError(
                f"{where}: no layer of {type(self.model).__name__} has experts",
                "use a mixture-of-experts checkpoint",
            )
        layers_path = self.experts[0].path.split(f".{self.experts[0].decoder_layer}.")[0]
        self.decoder_layers = tuple(
            f"{layers_path}.{n}" for n in range(len(self.model.get_submodule(layers_path)))
        )
        """The module path of each decoder layer."""
        self.activation = "silu"
        """Of gate, in every expert."""
        self.top_k: int = self.model.config.num_experts_per_tok
        """How many experts a token chooses."""
        self.embedding = self._embedding()
        """The name of the input embedding's weight."""
        self.tied = bool(self.model.config.tie_word_embeddings)
        """True if the head is the embedding."""
        left_out = {f"{module.path}.{name}" for module in self.experts for name in FUSED}
        left_out |= {f"{HEAD}.weight"} if self.tied else set()
        self.trunk: dict[str, tuple[int, ...]] = {
            name: tuple(tensor.shape)
            for name, tensor in self.model.state_dict().items()
            if name not in left_out
        }
        """Name -> shape of every tensor that is not an expert's, without a tied head."""
        self.linears: dict[str, tuple[int, int]] = {
            name: (module.out_features, module.in_features)
            for name, module in self.model.named_modules()
            if type(module) is nn.Linear and module.bias is None and self._is_packable(name)
        }
        """Module path -> (rows, columns) of the matrices that may be packed."""
        self.architecture = self._architecture(config)
        """As the index has it."""
        self._ordinals = {module.path: layer for layer, module in enumerate(self.experts)}

    def role(self, name: str) -> ExpertTensor | FusedTensor | str | None:
        """What a tensor of the checkpoint is: an expert's, all experts' of a layer, the trunk's
        (its name there); None for what transformers does not load.

        A tensor that the model does not have keeps its name, which is not in `trunk`.
        """
        target = self._table.target(name)
        if target is None:
            return None
        path, _, parameter = target.name.rpartition(".")
        layer = self._ordinals.get(path) if parameter in FUSED else None
        if target.expert is None:
            return (
                target.name
                if layer is None
                else FusedTensor(layer, parameter.removesuffix("_proj"))
            )
        if layer is None:
            return name
        if (parameter, target.parts) not in _SPELLED_OUT:
            raise SourceError(
                f"{self._where}: tensor {name} becomes {target.name} by a conversion that is not read",
                "use the original checkpoint",
            )
        return ExpertTensor(layer, target.expert, _PROJECTIONS[parameter, target.part])

    def experts_layer(self, path: str) -> int | None:
        """The layer whose experts module is `path`."""
        return self._ordinals.get(path)

    def decoder_layer(self, name: str) -> int | None:
        """The decoder layer that a tensor or module is in; None for what is in none."""
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
        architecture = Architecture.of_config(config, [module.path for module in self.experts])
        expected = (
            architecture.num_local_experts,
            architecture.hidden_size,
            architecture.intermediate_size,
        )
        for module in self.experts:
            found = (module.experts, module.hidden, module.intermediate)
            if found != expected:
                raise SourceError(
                    f"{self._where}: {module.path} has {found[0]} experts of {found[1]} and {found[2]}, expected are"
                    f" {expected[0]} of {expected[1]} and {expected[2]}",
                    "use a checkpoint whose layers have experts of one size",
                )
        return architecture

    def _find_experts(self) -> Iterator[ExpertsModule]:
        probed: set[type] = set()
        for path, module in self.model.named_modules():
            gate_up, down = (getattr(module, name, None) for name in FUSED)
            if not isinstance(gate_up, nn.Parameter) or not isinstance(down, nn.Parameter):
                continue
            if gate_up.dim() != 3 or down.dim() != 3:
                continue
            experts, hidden, intermediate = down.shape
            expected = (experts, 2 * intermediate, hidden)
            if (
                type(module) not in probed and not computes_gated_silu(module)
            ) or gate_up.shape != expected:
                raise SourceError(
                    f"{self._where}: {path} ({type(module).__name__}) computes something else than silu(gate) * up,"
                    " then down, for each expert: packed experts cannot stand for it",
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
    # Whatever a foreign library raises for a stranger's values: TypeError, KeyError,
    # ZeroDivisionError and its own.
    except Exception as e:
        raise SourceError(
            f"{where}: transformers refuses it: {type(e).__name__}: {short(str(e))}",
            f"correct {where}",
        ) from e
    # The experts' own forward is what the probe asks, not a kernel for them.
    model.config._experts_implementation = "eager"
    return model.eval()
