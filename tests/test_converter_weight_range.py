"""Weights that no packing holds, or that overflow sums: file, tensor and place are named, whoever meets them first."""

from pathlib import Path

import pytest
import torch
from make_checkpoint import SHAPES, make_checkpoint
from safetensors.torch import load_file, save_file

from converter.convert import convert_checkpoint
from converter.recipes import make_recipe
from converter.source import Checkpoint
from converter.streamed_model import StreamedModel
from formats.errors import SourceError

UP = "model.layers.0.block_sparse_moe.experts.2.w3.weight"
QUERIES = "model.layers.0.self_attn.q_proj.weight"


def spoiled(folder: Path, name: str, value: float) -> Path:
    """A checkpoint of two layers with `value` at [5, 7] of the tensor `name`."""
    make_checkpoint(folder, SHAPES["mini"], 2)
    tensors = load_file(folder / "model.safetensors")
    tensors[name][5, 7] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        (UP, {"calibrate": "none", "solver": "refit"}),
        (UP, {"calibrate": "none", "solver": "hqq"}),
        (QUERIES, {"calibrate": "none", "solver": "refit"}),
        (QUERIES, {"calibrate": "random", "calibration_tokens": 1024}),
    ],
)
@pytest.mark.parametrize(
    ("value", "message"), [(-(2.0**100), r"largest weight is -1.26765e\+30, at \[5, 7\]"), (torch.nan, "NaN")]
)
def test_weight_that_cannot_be_converted_is_named(tmp_path, name, recipe, value, message) -> None:
    source = spoiled(tmp_path / "source", name, value)
    with pytest.raises(SourceError, match=rf"model.safetensors: tensor {name}.*{message}") as caught:
        convert_checkpoint(source, tmp_path / "out", make_recipe("4bit", **recipe))
    assert "get it again" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("value", "message"), [(2.0**127, r"layer 0: expert 2.*largest weight is 1.70141e\+38"), (torch.inf, "infinite")]
)
def test_comparison_with_an_original_names_the_weight(tmp_path, value, message) -> None:
    source = spoiled(tmp_path / "source", UP, value)
    windows = torch.randint(0, 4096, (4, 32), generator=torch.Generator().manual_seed(0))
    with Checkpoint(source) as checkpoint, pytest.raises(SourceError, match=message) as caught:
        StreamedModel(checkpoint, windows).run()
    assert f"model.safetensors: tensor {UP}" in str(caught.value)
    assert "[5, 7]" in str(caught.value)


def test_weight_beyond_float16_is_named_where_experts_stay(tmp_path: Path) -> None:
    source = spoiled(tmp_path / "source", UP, 1e6)
    recipe = make_recipe("16bit", gate_up="rows-f16", calibrate="none")
    with pytest.raises(SourceError, match=rf"tensor {UP}: its largest weight is 999424, at \[5, 7\]; .*rows-f16"):
        convert_checkpoint(source, tmp_path / "out", recipe)
