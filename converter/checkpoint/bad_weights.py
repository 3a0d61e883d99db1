"""The weight behind activations that are not finite: named where it can be, since only it can be
mended.
"""

import torch

from converter.checkpoint.source import Checkpoint
from converter.checkpoint.source_tensors import Weight
from converter.solver_errors import DAMAGED_HINT
from formats.errors import SourceError

_BYTES_AT_ONCE = 16 << 20


def overflow_error(checkpoint: Checkpoint, layer: int | None, where: str) -> SourceError:
    """The error of activations that became infinite or NaN in `layer` (None: after the last), at
    `where`.

    Names the layer's first weight that is not finite, else the largest one. Reads all of the
    layer's weights.
    """
    largest, place = -1.0, ""
    for weight in _weights_of(checkpoint, layer):
        step = max(1, _BYTES_AT_ONCE // (weight.n_bytes // weight.shape[0]))
        for begin in range(0, weight.shape[0], step):
            rows = checkpoint.read_rows(weight, begin, min(begin + step, weight.shape[0]))
            try:
                checkpoint.check_finite(weight, begin, rows)
            except SourceError as e:
                return e
            magnitude = rows.float().abs().flatten()
            index = int(magnitude.argmax())
            if float(magnitude[index]) > largest:
                largest = float(magnitude[index])
                at = [int(i) for i in torch.unravel_index(torch.tensor(index), rows.shape)]
                place = f"{weight.shard}, tensor {weight.name} at {weight.place(begin + at[0], *at[1:])}"
    return SourceError(
        f"{checkpoint.folder}: {where}: the activations are infinite or NaN; the largest weight there is {largest:g}:"
        f" {place}",
        DAMAGED_HINT,
    )


def _weights_of(checkpoint: Checkpoint, layer: int | None) -> list[Weight]:
    sites = checkpoint.shape.experts
    experts = [
        weight
        for key, weight in checkpoint.experts.items()
        if sites[key.layer].decoder_layer == layer
    ]
    trunk = [
        weight for name, weight in checkpoint.trunk.items() if checkpoint.layer_of(name) == layer
    ]
    return [*trunk, *experts]
