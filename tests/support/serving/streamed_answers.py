"""Logits of the streamed forward pass and of transformers."""

from pathlib import Path

import torch

from converter.checkpoint.source import Checkpoint
from converter.forward.streamed_model import StreamedModel


def some_windows(count: int, window: int) -> torch.Tensor:
    return torch.randint(0, 4096, (count, window), generator=torch.Generator().manual_seed(0))


def transformers_answer(
    folder: Path, windows: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return logits [windows, window, vocabulary] and sorted choices [windows · window, k]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chosen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(
            lambda _m, _x, output: chosen.append(output[-1].sort(-1).values)
        )
    with torch.no_grad():
        return model(input_ids=windows, use_cache=False).logits, chosen


def streamed(folder: Path, windows: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    with Checkpoint(folder) as checkpoint:
        model = StreamedModel(checkpoint, windows)
        model.run()
        found = [(logits(0, windows.shape[1]), chosen) for logits, chosen in model.predictions()]
    chosen = torch.cat([c for _, c in found], 1).sort(-1).values
    return torch.stack([logits for logits, _ in found]), list(chosen)
