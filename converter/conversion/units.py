"""Units of work of a conversion: their weights, their decoder layer and their order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from converter.checkpoint.model_shape import ModelShape
from converter.checkpoint.names import EXPERT_MATRICES, ExpertTensor
from converter.checkpoint.shards.shard_source import ShardNeed
from converter.checkpoint.source import Checkpoint
from converter.checkpoint.weight import Weight
from converter.journal.keys import ExpertKey, LinearKey, TensorKey, UnitKey
from converter.output.conversion_sizes import OutputPlan


@dataclass(frozen=True)
class Unit:
    """One piece of work.

    layer: decoder layer with which it is done; 0 for the embeddings, None after the last layer.
    weights: the weights that it reads.
    """

    key: UnitKey
    layer: int | None
    weights: tuple[Weight, ...]

    @property
    def source_bytes(self) -> int:
        return sum(weight.n_bytes for weight in self.weights)

    @property
    def shards(self) -> frozenset[str]:
        return frozenset(weight.shard for weight in self.weights)

    @property
    def place(self) -> tuple[str, int]:
        """Shard and offset of the unit's last weight. This order needs few shards at once."""
        return max((weight.shard, weight.offset) for weight in self.weights)


def units_of(
    checkpoint: Checkpoint, plan: OutputPlan, layers: Sequence[int], *, outer: bool
) -> list[Unit]:
    """Return the units of some layers of experts, in the order in which checkpoints store them.

    Decoder layers without experts come with the next layer that has experts, or with the last.
    outer: also return the units before and after all decoder layers.
    """
    shape = checkpoint.shape
    trunk = [*_linears(checkpoint, plan), *_tensors(checkpoint, plan)]
    embedding = TensorKey(shape.embedding)
    experts = {shape.experts[layer].decoder_layer: layer for layer in layers}
    units = [unit for unit in trunk if unit.key == embedding] if outer else []
    for decoder_layer in _decoder_layers(shape, layers):
        inner = [unit for unit in trunk if unit.layer == decoder_layer and unit.key != embedding]
        if decoder_layer in experts:
            inner += expert_units(checkpoint, experts[decoder_layer])
        units += sorted(inner, key=lambda unit: unit.place)
    return units + ([unit for unit in trunk if unit.layer is None] if outer else [])


def expert_units(checkpoint: Checkpoint, layer: int) -> Iterator[Unit]:
    """Yield the units of one layer's experts."""
    decoder_layer = checkpoint.shape.experts[layer].decoder_layer
    for expert in range(checkpoint.architecture.num_local_experts):
        weights = (
            checkpoint.experts[ExpertTensor(layer, expert, projection)]
            for projection in EXPERT_MATRICES
        )
        yield Unit(ExpertKey(layer, expert), decoder_layer, tuple(weights))


def _decoder_layers(shape: ModelShape, layers: Sequence[int]) -> range:
    """Return the decoder layers whose units come with consecutive layers of experts."""
    if not layers:
        return range(0)
    begin = shape.experts[layers[0] - 1].decoder_layer + 1 if layers[0] else 0
    is_last = layers[-1] == len(shape.experts) - 1
    return range(
        begin, len(shape.decoder_layers) if is_last else shape.experts[layers[-1]].decoder_layer + 1
    )


def shard_needs(units: Sequence[Unit], *, by_layer: bool) -> list[ShardNeed]:
    """Return the shards that each unit needs.

    by_layer: True for calibration, which reads all shards of a layer before its first unit is done.
    """
    if not by_layer:
        return [ShardNeed(unit.key, unit.shards) for unit in units]
    layer_shards: dict[int | None, frozenset[str]] = {}
    for unit in units:
        layer_shards[unit.layer] = layer_shards.get(unit.layer, frozenset()) | unit.shards
    return [
        ShardNeed(unit.key, unit.shards if unit.layer is None else layer_shards[unit.layer])
        for unit in units
    ]


def _linears(checkpoint: Checkpoint, plan: OutputPlan) -> Iterator[Unit]:
    for module in plan.packed:
        yield Unit(
            LinearKey(module), checkpoint.layer_of(module), (checkpoint.trunk[f"{module}.weight"],)
        )


def _tensors(checkpoint: Checkpoint, plan: OutputPlan) -> Iterator[Unit]:
    for entry in plan.trunk_entries:
        if entry.name in checkpoint.trunk:
            yield Unit(
                TensorKey(entry.name),
                checkpoint.layer_of(entry.name),
                (checkpoint.trunk[entry.name],),
            )
