"""Changes of a KV cache layer's sequences and length, which each kind of layer supports."""

from collections.abc import Callable
from typing import Any

import torch

CACHE_CHANGES: dict[str, Callable[[Any], None]] = {
    "swap": lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
    "same": lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
    "crop": lambda layer: layer.crop(-3),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([-1])),
}
