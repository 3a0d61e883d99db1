"""The tensors of a source checkpoint by role, each stored once and with the model's shape."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from converter.checkpoint.foreign_layouts import foreign_role, plain_name
from converter.checkpoint.model_shape import HEAD, ModelShape
from converter.checkpoint.names import EXPERT_MATRICES, ExpertTensor, FusedTensor
from converter.checkpoint.surplus_tensors import surplus_error
from converter.checkpoint.weight import TORCH_DTYPES, Weight
from formats.config.model_types import MODEL_TYPES, ModelType
from formats.errors import SourceError
from formats.files.log_once import warn_once

HEAD_WEIGHT = f"{HEAD}.weight"

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
"""Module of the trunk -> config.json's fields that give its shape, equal in every model type."""
_SHOWN = 4


def stored_tensors(shape: ModelShape) -> int:
    """Return the largest number of tensors that a checkpoint of the model needs."""
    return len(shape.trunk) + sum(3 * module.experts for module in shape.experts)


@dataclass
class SourceTensors:
    """The experts' projections, and the trunk's tensors by their names in a converted folder.

    A stored head is in the trunk even if config.json ties it to the embedding. where: the
    checkpoint, for messages.
    """

    where: str
    shape: ModelShape
    experts: dict[ExpertTensor, Weight] = field(default_factory=dict)
    trunk: dict[str, Weight] = field(default_factory=dict)

    def assign(self, weights: Iterable[Weight]) -> None:
        """Give each stored tensor its role.

        SourceError for a tensor without a role, for two with the same, and for a wrong shape or
        dtype.
        """
        surplus: list[Weight] = []
        renamed: list[str] = []
        for weight in weights:
            role = foreign_role(weight.name, self.shape)
            if role is None:
                continue
            if plain_name(weight.name) != weight.name:
                renamed.append(weight.name)
            if not self._put(role, weight):
                surplus.append(weight)
        if surplus:
            raise surplus_error(self.where, surplus, self.shape)
        if renamed:
            warn_once(
                f"{self.where}: {len(renamed)} tensors are read under other names:"
                f" {renamed[0]} as {plain_name(renamed[0])}"
            )

    def check_complete(self, shape: ModelShape) -> None:
        """Raise SourceError with the tensors that are missing.

        shape: the model's, whose head is tied or not as the stored tensors decided.
        """
        missing = [name for name in shape.trunk if name not in self.trunk]
        if missing == [HEAD_WEIGHT]:
            raise SourceError(
                f"{self.where}: {HEAD_WEIGHT} is not stored, and tie_word_embeddings in"
                " config.json is false or missing: transformers would fill the head with random"
                " numbers",
                'get the whole checkpoint; or set "tie_word_embeddings": true in config.json, if'
                " the head is the embedding",
            )
        self._check_layers(shape)
        missing += [
            f"layer {module.decoder_layer} expert {expert} {projection}"
            for layer, module in enumerate(shape.experts)
            for expert in range(shape.architecture.num_local_experts)
            for projection in EXPERT_MATRICES
            if ExpertTensor(layer, expert, projection) not in self.experts
        ]
        if missing:
            shown = ", ".join(sorted(missing)[:_SHOWN])
            raise SourceError(
                f"{self.where}: {len(missing)} tensors are missing: {shown}",
                "get the whole checkpoint",
            )

    def _check_layers(self, shape: ModelShape) -> None:
        """Raise SourceError if the last decoder layers have no tensor at all."""
        stored = {shape.experts[key.layer].decoder_layer for key in self.experts}
        stored |= {layer for name in self.trunk if (layer := shape.decoder_layer(name)) is not None}
        expected = shape.architecture.num_hidden_layers
        if stored and (last := max(stored)) + 1 < expected:
            raise SourceError(
                f"{self.where}: num_hidden_layers in config.json is {expected}, the tensors end"
                f" with layer {last}",
                "get the whole checkpoint; if it is whole, set num_hidden_layers to"
                f" {last + 1} in config.json",
            )

    def _put(self, role: ExpertTensor | FusedTensor | str, weight: Weight) -> bool:
        """Store a tensor by its role; return False if the model has no such role."""
        if isinstance(role, FusedTensor):
            self._put_fused(role, weight)
            return True
        if isinstance(role, ExpertTensor):
            if role.expert >= self.shape.architecture.num_local_experts:
                return False
            shape = self._projection_shape(role.projection)
            self._check(weight, shape, self._projection_fields(role.projection))
            self._put_expert(role, weight)
            return True
        # A tied head has the embedding's shape.
        name = self.shape.embedding if role == HEAD_WEIGHT else role
        if name not in self.shape.trunk:
            return False
        self._check(weight, self.shape.trunk[name], _FIELDS.get(role.split(".")[-2], ""))
        if other := self.trunk.get(role):
            raise self._duplicate(other, weight)
        self.trunk[role] = weight
        return True

    def _put_fused(self, role: FusedTensor, weight: Weight) -> None:
        """Cut a tensor of all experts into the experts' projections; no byte is read."""
        experts = self.shape.architecture.num_local_experts
        rows, columns = self._projection_shape(role.projection)
        fields = f"{self._model_type.experts}, {self._projection_fields(role.projection)}"
        self._check(weight, (experts, rows, columns), fields)
        projections = ("gate", "up") if role.projection == "gate_up" else (role.projection,)
        part_rows = rows // len(projections)
        for expert in range(experts):
            for number, projection in enumerate(projections):
                row = number * part_rows
                offset = weight.offset + (expert * rows + row) * columns * weight.item_bytes
                part = replace(
                    weight, shape=(part_rows, columns), offset=offset, origin=(expert, row)
                )
                self._put_expert(ExpertTensor(role.layer, expert, projection), part)

    def _put_expert(self, key: ExpertTensor, weight: Weight) -> None:
        if other := self.experts.get(key):
            raise self._duplicate(other, weight)
        self.experts[key] = weight

    def _projection_shape(self, projection: str) -> tuple[int, int]:
        intermediate = self.shape.architecture.intermediate_size
        hidden = self.shape.architecture.hidden_size
        if projection == "down":
            return hidden, intermediate
        return (2 * intermediate if projection == "gate_up" else intermediate), hidden

    def _projection_fields(self, projection: str) -> str:
        """Return config.json's fields that give the shape of an expert's projection."""
        width = self._model_type.expert_width
        if projection == "down":
            return f"hidden_size, {width}"
        return f"2 * {width}, hidden_size" if projection == "gate_up" else f"{width}, hidden_size"

    @property
    def _model_type(self) -> ModelType:
        return MODEL_TYPES[self.shape.model_type]

    def _duplicate(self, one: Weight, other: Weight) -> SourceError:
        return SourceError(
            f"{self.where}: tensors {one.name} in {one.shard} and {other.name} in {other.shard}"
            " are the same weight",
            "keep one of the two",
        )

    def _check(self, weight: Weight, shape: tuple[int, ...], fields: str) -> None:
        """Raise SourceError unless the tensor has a known dtype and this shape.

        fields: config.json's fields that give the shape, for the message.
        """
        place = f"{self.where}/{weight.shard}: tensor {weight.name}"
        if weight.dtype not in TORCH_DTYPES:
            raise SourceError(
                f"{place} is {weight.dtype}, expected is one of {', '.join(TORCH_DTYPES)}",
                "use the original checkpoint",
            )
        if weight.shape != shape:
            by = f" ({fields})" if fields else ""
            raise SourceError(
                f"{place} has shape {list(weight.shape)}, config.json says {list(shape)}{by}",
                "get config.json and shards of the same checkpoint, or correct the field in"
                " config.json",
            )
