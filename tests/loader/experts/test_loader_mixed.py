"""Folders whose bits differ by layer, projection or expert: the logits of their weights; supported
layers use the fast path.
"""

from pathlib import Path

import pytest
import torch
from loaded_models import apart, dequantized, load, logits, slots_budget
from single_tokens import IDS, token_by_token

from converter.convert import convert_checkpoint
from converter.recipe.recipes import make_recipe
from formats.artifact import Artifact
from loader.arithmetic import kernels
from loader.budget.expert_sizes import expert_bytes_by_layer

RULES = {
    "by layer": "0=4bit,2-3/down=3bit,6/gate_up=3bit,7=tile32-q2-g16-s8",
    "by expert": "1:0-3=3bit,5:7/down=4bit",
}
native = pytest.mark.skipif(not kernels.available(), reason="not built")


@pytest.fixture(scope="module")
def mixed(example_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mixed")
    for name, rules in RULES.items():
        convert_checkpoint(example_folder, root / name, make_recipe(rules=[rules], solver="hqq"))
    return {name: root / name for name in RULES}


@pytest.mark.parametrize("rules", RULES)
def test_logits_are_those_of_the_dequantized_weights(mixed: dict[str, Path], rules: str) -> None:
    assert apart(logits(load(mixed[rules]), IDS), logits(dequantized(mixed[rules]), IDS)) < 1e-3


@native
@pytest.mark.parametrize("rules", RULES)
def test_native_logits_differ_by_the_rounding_of_activations_only(
    mixed: dict[str, Path], rules: str
) -> None:
    exact = logits(dequantized(mixed[rules]), IDS)
    model = load(mixed[rules], kernels="native", ram_cache="1GiB")
    for found in (logits(model, IDS), token_by_token(model)):
        assert ((found - exact).square().mean().sqrt() / exact.std()).item() < 0.05


@native
@pytest.mark.parametrize("rules", RULES)
def test_single_tokens_take_the_decoder_whatever_the_layouts(
    mixed: dict[str, Path], rules: str
) -> None:
    model = load(mixed[rules], kernels="native", ram_cache="1GiB")
    token_by_token(model)
    assert model.moe_stats().paths.decoder == IDS.shape[1]


@pytest.mark.parametrize("rules", RULES)
def test_a_small_cache_gives_the_same_bits(mixed: dict[str, Path], rules: str) -> None:
    folder = mixed[rules]
    whole, small = load(folder, ram_cache="1GiB"), load(folder, ram_cache=slots_budget(folder, 3))
    assert torch.equal(logits(small, IDS), logits(whole, IDS))
    assert torch.equal(token_by_token(small), token_by_token(whole))


def test_slots_have_the_size_of_the_layers_largest_expert(mixed: dict[str, Path]) -> None:
    artifact = Artifact.open(mixed["by expert"])
    sizes = expert_bytes_by_layer(artifact)
    assert sizes[1] == artifact.layout(1, 0).n_bytes > artifact.layout(1, 4).n_bytes
    assert sizes[5] == artifact.layout(5, 7).n_bytes > sizes[0]
