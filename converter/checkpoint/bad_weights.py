"""Names the weight behind activations that are infinite or NaN: only a weight can be repaired."""

import torch
from torch import Tensor

from converter.checkpoint.source import Checkpoint
from converter.checkpoint.weight import Weight
from converter.solver_errors import DAMAGED_HINT
from formats.errors import SourceError

_SLICE_BYTES = 16 << 20


def overflow_error(checkpoint: Checkpoint, layer: int | None, where: str) -> SourceError:
    """Return the error of activations that became infinite or NaN in decoder layer `layer`.

    It names the layer's first weight that is not finite, else the largest. Reads all of the layer's
    weights. layer: None for the part after the last layer. where: the step, for the message.
    """
    largest = -1.0
    largest_place = ""
    for weight in _weights_of(checkpoint, layer):
        step = max(1, _SLICE_BYTES // (weight.n_bytes // weight.shape[0]))
        for begin in range(0, weight.shape[0], step):
            rows = checkpoint.read_rows(weight, begin, min(begin + step, weight.shape[0]))
            try:
                checkpoint.check_finite(weight, begin, rows)
            except SourceError as e:
                return e
            magnitude, position = _largest(rows)
            if magnitude > largest:
                largest = magnitude
                row, *rest = position
                place = weight.place(begin + row, *rest)
                largest_place = f"{weight.shard}, tensor {weight.name} at {place}"
    return SourceError(
        f"{checkpoint.folder}: {where}: the activations are infinite or NaN;"
        f" the largest weight there is {largest:g}: {largest_place}",
        DAMAGED_HINT,
    )


def _largest(rows: Tensor) -> tuple[float, list[int]]:
    """Return the largest absolute value and its indices."""
    magnitudes = rows.float().abs().flatten()
    index = magnitudes.argmax()
    position = [int(i) for i in torch.unravel_index(index, rows.shape)]
    return float(magnitudes[index]), position


def _weights_of(checkpoint: Checkpoint, layer: int | None) -> list[Weight]:
    modules = checkpoint.shape.experts
    trunk = [
        weight for name, weight in checkpoint.trunk.items() if checkpoint.layer_of(name) == layer
    ]
    experts = [
        weight
        for key, weight in checkpoint.experts.items()
        if modules[key.layer].decoder_layer == layer
    ]
    return [*trunk, *experts]
