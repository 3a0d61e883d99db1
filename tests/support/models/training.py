"""Models and batches for tests of gradients."""

from pathlib import Path
from typing import Any

import torch
from loaded_models import load, slots_budget


def loaded(folder: Path, cache: str = "all", **options: Any) -> Any:
    """The model with its experts all in RAM, in two slots a layer, or where they lie in a map."""
    places: dict[str, dict[str, Any]] = {
        "all": {"io": "direct"},
        "two": {"io": "direct", "ram_cache": slots_budget(folder, 2)},
        "mmap": {"io": "mmap"},
    }
    return load(folder, **{"ram_cache": "1GiB", "kernels": "auto", **places[cache], **options})


def batch(rows: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(3, 4000, (rows, length), generator=torch.Generator().manual_seed(1))
