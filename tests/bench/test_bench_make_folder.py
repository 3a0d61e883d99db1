"""bench/make_folder.py: a made folder is a converted folder, and the seed decides its bytes."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from make_folder import make_random_folder
from model_shapes import SHAPES, shape_config
from random_matrices import ExpertPool, generator_for

import loader
from converter.recipe.recipes import RECIPES
from formats.artifact import Artifact
from formats.errors import OutputError, RecipeError
from formats.expert import ExpertLayout
from formats.packing import ALL_PACKINGS, AnyPacking
from formats.reading.verify import verify_folder
from formats.tiles import expert_weights
from loader.traces.routing_recorder import RoutingRecorder

SMALL = {
    "layers": 3,
    "hidden": 96,
    "intermediate": 80,
    "heads": 4,
    "kv_heads": 2,
    "vocab": 4200,
    "positions": 64,
}


def small(shape: str = "mixtral-8x7b", **sizes: int) -> dict[str, Any]:
    head_dim = {} if shape == "olmoe-7b" else {"head_dim": 32}
    return shape_config(shape, **SMALL | head_dim | sizes)


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def logits(folder: Path, tokens: int = 24) -> torch.Tensor:
    """Logits of a prompt and of the tokens that the model then generates, float32 [n, vocab]."""
    model = loader.from_pretrained(folder)
    ids = torch.tensor([[1, 5, 4000]])
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    ids = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
    assert ids.shape == (1, 3 + tokens)
    with torch.inference_mode():
        result: torch.Tensor = model(ids).logits[0].float()
    return result


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_folder_of_each_recipe_verifies_and_generates(recipe: str, tmp_path: Path) -> None:
    make_random_folder(tmp_path, small(), recipe)
    assert verify_folder(tmp_path, read_data=True).problems == []
    assert Artifact.open(tmp_path).index.recipe.name == recipe
    assert logits(tmp_path).std() == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_folder_of_each_shape_verifies_and_generates(shape: str, tmp_path: Path) -> None:
    make_random_folder(tmp_path, small(shape, experts=12, top_k=4))
    assert verify_folder(tmp_path, read_data=True).problems == []
    assert Artifact.open(tmp_path).architecture.num_local_experts == 12
    assert logits(tmp_path).isfinite().all()


def test_activations_stay_small_through_32_layers(tmp_path: Path) -> None:
    make_random_folder(tmp_path, small(layers=32), skew=0.5)
    assert logits(tmp_path).std() == pytest.approx(1, abs=0.3)


def test_the_seed_decides_the_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_random_folder(tmp_path / name, small(), seed=seed)
    first, same, other = (hashes(tmp_path / name) for name in "abc")
    assert first == same
    different = {name for name in first if first[name] != other[name]}
    assert different == {
        "moe_index.json",
        "trunk.safetensors",
        *(f"experts/layer-{layer:03d}.safetensors" for layer in range(3)),
    }


def test_no_two_experts_are_equal(tmp_path: Path) -> None:
    make_random_folder(tmp_path, small())
    layers = Artifact.open(tmp_path).index.layers
    assert len({expert.sha256 for layer in layers for expert in layer.experts}) == 3 * 8


def busiest_share(folder: Path) -> float:
    """Mean over the layers: share of the busiest quarter of the experts in all choices."""
    model = loader.from_pretrained(folder)
    ids = torch.randint(5, 4096, (8, 64), generator=torch.Generator().manual_seed(0))
    with RoutingRecorder(model, 1) as recorder, torch.inference_mode():
        model(ids)
    experts = torch.from_numpy(recorder.take().experts).long()
    counts = torch.stack([experts[:, layer].flatten().bincount(minlength=8) for layer in range(3)])
    busiest = counts.sort(dim=1, descending=True).values[:, :2]
    return float(busiest.sum() / counts.sum())


def test_all_experts_are_used_alike_unless_the_routers_are_skewed(tmp_path: Path) -> None:
    make_random_folder(tmp_path / "even", small())
    make_random_folder(tmp_path / "skewed", small(), skew=1.0)
    assert busiest_share(tmp_path / "even") < 0.35
    assert busiest_share(tmp_path / "skewed") > 0.38


def test_the_tokenizer_knows_each_token_of_the_model(tmp_path: Path) -> None:
    make_random_folder(tmp_path, small())
    tokenizer = loader.load_tokenizer(tmp_path)
    assert sorted(tokenizer.get_vocab().values()) == list(range(SMALL["vocab"]))
    assert tokenizer.decode(tokenizer("Guten Tag")["input_ids"], skip_special_tokens=True)


@pytest.mark.parametrize("packing", ALL_PACKINGS.values(), ids=list(ALL_PACKINGS))
def test_weights_have_mean_0_and_keep_the_size_of_their_input(packing: AnyPacking) -> None:
    layout = ExpertLayout(256, 80, packing, packing)
    pool = ExpertPool(layout, generator_for(0, "pool"))
    for matrix in expert_weights(layout, pool.draw(generator_for(0, "expert"))):
        x = torch.randn(matrix.shape[1], 64, generator=torch.Generator().manual_seed(0))
        assert (matrix @ x).std() == pytest.approx(1, abs=0.15)
        assert abs(matrix.mean() / matrix.std()) < 0.05


def test_a_folder_with_files_and_a_small_vocabulary_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(OutputError, match="is not empty"):
        make_random_folder(tmp_path, small())
    with pytest.raises(RecipeError, match=r"vocab: 128, but the tokenizer has 4096 tokens"):
        small(vocab=128)


def test_a_folder_that_fails_is_removed(tmp_path: Path) -> None:
    def stop(n_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_random_folder(tmp_path / "made", small(), done=stop)
    assert not (tmp_path / "made").exists()
