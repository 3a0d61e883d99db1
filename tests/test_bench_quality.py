"""The test bed of solvers: its outlier model is the same function, and its measure is zero for the original."""

from pathlib import Path

import pytest
import torch
from quality import compare, log_probabilities, make_outliers
from safetensors.torch import load_file

from loader.checkpoint import load_checkpoint


def windows() -> torch.Tensor:
    return torch.randint(3, 4096, (4, 32), generator=torch.Generator().manual_seed(0))


def test_outlier_model_computes_the_same(example_folder: Path, tmp_path: Path) -> None:
    make_outliers(example_folder, tmp_path / "outliers")
    plain = load_checkpoint(example_folder).float()
    strong = load_checkpoint(tmp_path / "outliers").float()
    torch.testing.assert_close(
        log_probabilities(strong, windows()), log_probabilities(plain, windows()), rtol=1e-3, atol=1e-3
    )
    shard = "model-00001-of-00004.safetensors"
    before, after = load_file(example_folder / shard), load_file(tmp_path / "outliers" / shard)
    name = "model.layers.0.input_layernorm.weight"
    assert float((after[name] / before[name]).max()) == 64


def test_measure_is_zero_for_the_original_and_counts_by_window(example_folder: Path) -> None:
    model = load_checkpoint(example_folder).float()
    batches = list(windows().split(2))
    found = compare([log_probabilities(model, b) for b in batches], model, batches)
    assert found == {"kl": 0, "kl_error": 0, "ratio": 1, "ratio_error": 0, "agreement": 1}
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    assert compare([log_probabilities(load_checkpoint(example_folder).float(), b) for b in batches], model, batches)[
        "kl"
    ] == pytest.approx(0.4, abs=0.4)
