"""Wider blocks of down's statistics: their values, benefit and cost, and the solvers that accept
them.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted_runs import hashes
from make_checkpoint import Shape, make_checkpoint

from converter.calibration.calibration_pass import CalibrationPass
from converter.calibration.calibration_text import calibration_tokens
from converter.calibration.moments import second_moment
from converter.checkpoint.outline import Outline
from converter.checkpoint.source import Checkpoint
from converter.convert import ConvertOptions, convert_checkpoint
from converter.output.conversion_sizes import plan_output
from converter.recipe.recipes import make_recipe
from converter.solvers.registry import choose_solver
from formats.errors import RecipeError
from formats.index import read_index


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "wide"
    make_checkpoint(folder, Shape(64, 640, 4, 2, experts=2), 1)
    return folder


def one_by_one(tasks: Any) -> list[Any]:
    return [task() for task in tasks]


@pytest.mark.parametrize(
    ("asked", "blocks", "width"), [(256, 3, 256), (512, 2, 512), ("full", 1, 768), (4096, 1, 768)]
)
def test_statistics_have_blocks_of_the_width_that_the_recipe_says(
    source: Path, tmp_path: Path, asked: int | str, blocks: int, width: int
) -> None:
    recipe = make_recipe(solver="feedback", down_width=asked)
    with Checkpoint(source) as checkpoint:
        tokens = calibration_tokens(checkpoint, "random", 1024)
        columns = recipe.options.down_block(checkpoint.architecture.intermediate_size)
        passes = CalibrationPass(checkpoint, tokens, tmp_path, "test", one_by_one, columns)
        layer = passes.prepare(0)
        assert layer.down.hessian.shape == (blocks, width, width)
        rows = torch.zeros(640, 64)
        statistics, correction = layer.down_statistics(
            1, lambda b, e: rows[b:e], lambda b, e: rows[b:e]
        )
        assert statistics.hessian.shape == (blocks, width, width)
        assert correction is not None and correction.factor.shape == (blocks, width, width)
        if blocks == 1:
            inner = torch.cat([e.inner for e in layer.experts]).float()
            weights = torch.cat([layer.weights[e.tokens] for e in layer.experts])
            expected = second_moment([inner], weights, one_by_one) / weights.sum()
            # The inner activations are kept in bfloat16.
            assert float((layer.down.hessian[0, :640, :640] - expected).norm()) < 0.01 * float(
                expected.norm()
            )


@pytest.mark.parametrize("workers", [1, 3])
def test_full_width_gives_the_same_bytes_for_any_workers_and_others_than_blocks(
    source: Path, tmp_path: Path, workers: int
) -> None:
    def convert(name: str, max_workers: int, width: int | str | None) -> dict[str, str]:
        recipe = make_recipe(
            solver="feedback", calibrate="random", calibration_tokens=1024, down_width=width
        )
        convert_checkpoint(source, tmp_path / name, recipe, ConvertOptions(max_workers))
        return hashes(tmp_path / name)

    full = convert("full", workers, "full")
    assert convert("again", 2, "full") == full
    assert read_index(tmp_path / "full").recipe.options["down_width"] == "full"
    blocks = convert("blocks", 2, None)
    assert blocks["experts/layer-000.safetensors"] != full["experts/layer-000.safetensors"]


def test_the_usual_width_is_the_recipe_as_it_was() -> None:
    assert make_recipe(solver="feedback", down_width=256) == make_recipe(solver="feedback")


def test_memory_is_estimated_by_width(source: Path) -> None:
    outline, solver = Outline.of_folder(source), choose_solver("refit")
    narrow, wide = (
        plan_output(outline, make_recipe(solver="feedback", down_width=width)).memory_bytes(
            2, solver
        )
        for width in (256, "full")
    )
    assert wide > narrow


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"down_width": 100}, "down-width 100"),
        ({"down_width": 0}, "down-width 0"),
        ({"down_width": "all"}, "down-width all"),
        ({"down_width": 512, "solver": "refit"}, "solver refit"),
    ],
)
def test_other_widths_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        make_recipe(**({"solver": "feedback"} | settings))
