"""Weights that cannot be stored: named with file, tensor and place."""

import re
from pathlib import Path

import pytest
from source_folders import SINGLE, W1, Tensors, fused, make_single, put, rewrite

from converter.convert import convert_checkpoint
from converter.recipe.recipes import make_recipe
from converter.solvers.native import solver_library
from formats.errors import MoeConvertError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint to be changed."""
    return make_single(tmp_path / "source")


@pytest.mark.parametrize("native", [True, False], ids=["native", "reference"])
@pytest.mark.parametrize("solver", ["hqq", "refit", "feedback", "hqq-package"])
@pytest.mark.parametrize("value", [1e30, float("nan")])
def test_bad_weight_is_named_with_its_place_by_every_solver(
    native: bool,
    solver: str,
    value: float,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not native:
        monkeypatch.setattr(solver_library, "available", lambda: False)
    rewrite(source, put(W1, value))
    calibration = (
        {"calibrate": "random", "calibration_tokens": 1024} if solver == "feedback" else {}
    )
    with pytest.raises(MoeConvertError) as caught:
        convert_checkpoint(
            source, tmp_path / "out", make_recipe("2bit", solver=solver, **calibration)
        )
    for word in (str(source / SINGLE), W1, "[5, 7]"):
        assert word in caught.value.message


def test_weight_beyond_the_stored_type_is_named_with_its_place(
    source: Path, tmp_path: Path
) -> None:
    rewrite(source, lambda t: t | {W1: t[W1].float()})
    rewrite(source, put(W1, 3.4e38))
    with pytest.raises(MoeConvertError, match="do not fit into rows-bf16") as caught:
        convert_checkpoint(source, tmp_path / "out", make_recipe("16bit"))
    for word in (str(source / SINGLE), W1, "[5, 7]"):
        assert word in caught.value.message


def test_bad_weight_of_a_fused_tensor_is_named_with_its_place_there(
    source: Path, tmp_path: Path
) -> None:
    fused(source)
    name = "model.layers.1.mlp.experts.gate_up_proj"

    def change(t: Tensors) -> None:
        t[name][2, 100, 7] = float("nan")

    rewrite(source, change)
    with pytest.raises(
        MoeConvertError,
        match=re.escape(f"{name} has 1 NaN or infinite values, the first at [2, 100, 7]"),
    ):
        convert_checkpoint(source, tmp_path / "out", make_recipe("16bit"))


@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_bad_weight_is_named_where_calibration_meets_it_first(
    value: float, source: Path, tmp_path: Path
) -> None:
    name = "model.layers.0.self_attn.v_proj.weight"
    rewrite(source, put(name, value))
    recipe = make_recipe("2bit", calibrate="random", calibration_tokens=1024)
    with pytest.raises(MoeConvertError) as caught:
        convert_checkpoint(source, tmp_path / "out", recipe)
    for word in (SINGLE, name, "[5, 7]"):
        assert word in caught.value.message
