"""The tensors of a source checkpoint by their role in the model: each needed one there once, with
the right shape.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import prod

import torch

from converter.checkpoint.foreign_layouts import foreign_role, plain_name
from converter.checkpoint.model_shape import ModelShape
from converter.checkpoint.names import ExpertTensor, FusedTensor
from formats.config.model_types import MODEL_TYPES, ModelType
from formats.errors import SourceError
from formats.files.log_once import warn_once

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
HEAD = "lm_head.weight"

_FIELDS = {
    "embed_tokens": "vocab_size, hidden_size",
    "lm_head": "vocab_size, hidden_size",
    "gate_proj": "intermediate_size, hidden_size",
    "up_proj": "intermediate_size, hidden_size",
    "down_proj": "hidden_size, intermediate_size",
    "input_layernorm": "hidden_size",
    "post_attention_layernorm": "hidden_size",
    "norm": "hidden_size",
    "q_proj": "num_attention_heads * head_dim, hidden_size",
    "k_proj": "num_key_value_heads * head_dim, hidden_size",
    "v_proj": "num_key_value_heads * head_dim, hidden_size",
    "o_proj": "hidden_size, num_attention_heads * head_dim",
}
"""config.json's fields that give the shape of a module of the trunk, where they have the same names
in every type.
"""


@dataclass(frozen=True)
class Weight:
    """A [rows, columns] matrix (or a vector: columns 0) in a shard, from `offset` bytes on."""

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    origin: tuple[int, ...] = (0,)
    """The place of its first row in the stored tensor, of which it may be a part."""

    def place(self, row: int, *rest: int) -> list[int]:
        """The indices in the stored tensor of an element."""
        return [*self.origin[:-1], self.origin[-1] + row, *rest]

    @property
    def item_bytes(self) -> int:
        return 4 if self.dtype == "F32" else 2

    @property
    def n_bytes(self) -> int:
        return prod(self.shape) * self.item_bytes


def stored_tensors(shape: ModelShape) -> int:
    """The most tensors that a checkpoint of the model needs: one for each matrix and vector."""
    return len(shape.trunk) + sum(3 * module.experts for module in shape.experts)


@dataclass
class SourceTensors:
    """The experts' projections and the trunk's tensors, under the names that they have in a
    converted folder. A head is here if it is stored, whatever config.json says of tied embeddings.
    """

    where: str
    """Of the checkpoint, for messages."""
    shape: ModelShape
    experts: dict[ExpertTensor, Weight] = field(default_factory=dict)
    trunk: dict[str, Weight] = field(default_factory=dict)

    def assign(self, weights: Iterable[Weight]) -> None:
        """Gives each tensor its role. SourceError for one that has none, a second one with the
        same, and a wrong shape or dtype.
        """
        a = self.shape.architecture
        shapes = dict(self.shape.trunk)
        shapes[HEAD] = shapes[self.shape.embedding]
        extra: list[Weight] = []
        renamed: list[Weight] = []
        for weight in weights:
            role = foreign_role(weight.name, self.shape)
            if role is not None and plain_name(weight.name) != weight.name:
                renamed.append(weight)
            if isinstance(role, FusedTensor):
                self._put_fused(role, weight)
            elif isinstance(role, ExpertTensor):
                if role.expert >= a.num_local_experts:
                    extra.append(weight)
                else:
                    self._check(
                        weight,
                        self._projection_shape(role.projection),
                        self._fields(role.projection),
                    )
                    self._put_expert(role, weight)
            elif role in shapes:
                self._check(weight, shapes[role], _FIELDS.get(role.split(".")[-2], ""))
                self._put_trunk(role, weight)
            elif role is not None:
                extra.append(weight)
        if extra:
            raise _extra(self.where, extra, self.shape)
        if renamed:
            first = renamed[0].name
            warn_once(
                f"{self.where}: {len(renamed)} tensors are read under other names: {first} as {plain_name(first)}"
            )

    def check_complete(self, shape: ModelShape) -> None:
        """SourceError naming what is missing of `shape`, whose head is tied or not as the tensors
        decided.
        """
        a, modules = shape.architecture, shape.experts
        missing = [name for name in shape.trunk if name not in self.trunk]
        if missing == [HEAD]:
            raise SourceError(
                f"{self.where}: {HEAD} is not stored, and tie_word_embeddings in config.json is false (or not given,"
                " which is the same): transformers would fill the head with random numbers",
                'get the whole checkpoint; or set "tie_word_embeddings": true in config.json, if the head is the'
                " embedding",
            )
        stored = {modules[key.layer].decoder_layer for key in self.experts}
        stored |= {layer for name in self.trunk if (layer := shape.decoder_layer(name)) is not None}
        if stored and (last := max(stored)) + 1 < a.num_hidden_layers:
            raise SourceError(
                f"{self.where}: num_hidden_layers in config.json is {a.num_hidden_layers}, the tensors end with layer"
                f" {last}",
                f"get the whole checkpoint; if it is whole, set num_hidden_layers to {last + 1} in config.json",
            )
        missing += [
            f"layer {modules[layer].decoder_layer} expert {expert} {projection}"
            for layer in range(a.expert_layers)
            for expert in range(a.num_local_experts)
            for projection in ("gate", "up", "down")
            if ExpertTensor(layer, expert, projection) not in self.experts
        ]
        if missing:
            raise SourceError(
                f"{self.where}: {len(missing)} tensors are missing: {', '.join(sorted(missing)[:4])}",
                "get the whole checkpoint",
            )

    def _projection_shape(self, projection: str) -> tuple[int, int]:
        rows, columns = (
            self.shape.architecture.intermediate_size,
            self.shape.architecture.hidden_size,
        )
        return {"down": (columns, rows), "gate_up": (2 * rows, columns)}.get(
            projection, (rows, columns)
        )

    @property
    def _model_type(self) -> ModelType:
        return MODEL_TYPES[self.shape.model_type]

    def _fields(self, projection: str) -> str:
        """config.json's fields that give the shape of an expert's projection."""
        width = self._model_type.expert_width
        if projection == "down":
            return f"hidden_size, {width}"
        return f"2 * {width}, hidden_size" if projection == "gate_up" else f"{width}, hidden_size"

    def _put_fused(self, role: FusedTensor, weight: Weight) -> None:
        """Cuts a tensor of all experts into the experts' projections; no byte is read."""
        experts = self.shape.architecture.num_local_experts
        rows, columns = self._projection_shape(role.projection)
        fields = f"{self._model_type.experts}, {self._fields(role.projection)}"
        self._check(weight, (experts, rows, columns), fields)
        parts = ("gate", "up") if role.projection == "gate_up" else (role.projection,)
        part_rows = rows // len(parts)
        for expert in range(experts):
            for i, part in enumerate(parts):
                row = i * part_rows
                offset = weight.offset + (expert * rows + row) * columns * weight.item_bytes
                piece = replace(
                    weight, shape=(part_rows, columns), offset=offset, origin=(expert, row)
                )
                self._put_expert(ExpertTensor(role.layer, expert, part), piece)

    def _put_expert(self, key: ExpertTensor, weight: Weight) -> None:
        if other := self.experts.get(key):
            raise self._twice(other, weight)
        self.experts[key] = weight

    def _put_trunk(self, name: str, weight: Weight) -> None:
        if other := self.trunk.get(name):
            raise self._twice(other, weight)
        self.trunk[name] = weight

    def _twice(self, one: Weight, other: Weight) -> SourceError:
        return SourceError(
            f"{self.where}: tensors {one.name} in {one.shard} and {other.name} in {other.shard} are the same weight",
            "keep one of the two",
        )

    def _check(self, weight: Weight, shape: tuple[int, ...], fields: str) -> None:
        place = f"{self.where}/{weight.shard}: tensor {weight.name}"
        if weight.dtype not in TORCH_DTYPES:
            raise SourceError(
                f"{place} is {weight.dtype}; read are {', '.join(TORCH_DTYPES)}",
                "use the original checkpoint",
            )
        if weight.shape != shape:
            by = f" ({fields})" if fields else ""
            raise SourceError(
                f"{place} has shape {list(weight.shape)}, config.json says {list(shape)}{by}",
                "get config.json and shards of the same checkpoint, or correct the field in config.json",
            )


_EXTRA_HINTS = (
    ("lora_", "merge the adapter into its base model first: peft's merge_and_unload"),
    (".base_layer.", "merge the adapter into its base model first: peft's merge_and_unload"),
    (".scales", "the weights are quantized; use the checkpoint that they were made from"),
    (".qweight", "the weights are quantized; use the checkpoint that they were made from"),
)
"""By a part of a tensor's name."""
_EXPERT = re.compile(r"\.experts\.([0-9]{1,9})\.")


def _extra(where: str, extra: list[Weight], shape: ModelShape) -> SourceError:
    """The error of tensors that the model does not have."""
    first = min(extra, key=lambda weight: weight.name)
    names = [plain_name(weight.name) for weight in extra]
    layers = [layer for name in names if (layer := shape.decoder_layer(name)) is not None]
    experts = [int(match[1]) for name in names if (match := _EXPERT.search(name))]
    for field_, said, numbers in (
        ("num_hidden_layers", len(shape.decoder_layers), layers),
        (MODEL_TYPES[shape.model_type].experts, shape.experts[0].experts, experts),
    ):
        stored = 1 + max(numbers, default=-1)
        if stored > said:
            return SourceError(
                f"{where}: {field_} in config.json is {said}, the tensors are of {stored}: {first.name} in"
                f" {first.shard}",
                f"if the shards are right, set {field_} to {stored} in config.json",
            )
    hint = next(
        (hint for part, hint in _EXTRA_HINTS if any(part in weight.name for weight in extra)),
        "remove what is not of the language model, such as a value or reward head",
    )
    some = ", ".join(sorted(weight.name for weight in extra)[:4])
    return SourceError(f"{where}: {len(extra)} tensors do not belong to the model: {some}", hint)
