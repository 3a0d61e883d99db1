"""An expert's bytes from its three stored matrices: the inverse of `formats.expert.split`."""

import torch
from torch import Tensor

from formats.expert import ExpertLayout
from formats.packing import Packing


def assemble(layout: ExpertLayout, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Join gate, up and down, each as stored in the file, to uint8 [n_bytes]."""
    tiled = isinstance(layout.gate_up, Packing)
    gate_up = torch.stack([gate, up], dim=1) if tiled else torch.stack([gate, up])
    return torch.cat([part.reshape(-1).view(torch.uint8) for part in (gate_up, down)])
