"""The test bed of solvers: its outlier model computes the same function, and its measure is zero
for the original.
"""

from pathlib import Path

import pytest
import torch
from quality import compare, expert_bits, log_probabilities, make_outliers, recipe_of
from safetensors.torch import load_file

from converter.checkpoint.outline import Outline
from converter.output.conversion_sizes import plan_output
from converter.recipe.bit_budget import likely_bits
from loader.hf.loading.plain_checkpoint import load_checkpoint


def windows() -> torch.Tensor:
    return torch.randint(3, 4096, (4, 32), generator=torch.Generator().manual_seed(0))


def test_outlier_model_computes_the_same(example_folder: Path, tmp_path: Path) -> None:
    make_outliers(example_folder, tmp_path / "outliers")
    plain = load_checkpoint(example_folder).float()
    strong = load_checkpoint(tmp_path / "outliers").float()
    torch.testing.assert_close(
        log_probabilities(strong, windows()),
        log_probabilities(plain, windows()),
        rtol=1e-3,
        atol=1e-3,
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
    assert compare(
        [log_probabilities(load_checkpoint(example_folder).float(), b) for b in batches],
        model,
        batches,
    )["kl"] == pytest.approx(0.4, abs=0.4)


@pytest.mark.parametrize(
    ("recipe", "bits"),
    [
        ("2bit", 2.506),
        ("4bit", 4.256),
        ("2bit-down3", 2.756),
        ("2bit/down=4bit", 3.09),
        ("3bpw", 3.0),
    ],
)
def test_bits_are_those_of_the_recipe_at_the_sizes_of_8x7b(
    example_folder: Path, recipe: str, bits: float
) -> None:
    outline = Outline.of_folder(example_folder)
    chosen = likely_bits(
        recipe_of(recipe, example_folder, "feedback", "builtin"), outline.architecture
    )
    assert expert_bits(plan_output(outline, chosen).layouts) == pytest.approx(
        bits, abs=0.05 if "bpw" in recipe else 0.001
    )
