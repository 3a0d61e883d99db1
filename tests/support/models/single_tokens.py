"""A model run token by token."""

from typing import Any

import torch
from decoding import NAME
from transformers import DynamicCache

IDS = torch.arange(7, 47)[None]


def token_by_token(model: Any) -> torch.Tensor:
    cache = DynamicCache()
    with torch.inference_mode():
        return torch.cat(
            [model(i, **{NAME: cache}, use_cache=True).logits for i in IDS.split(1, 1)], 1
        )
