"""Recipes and options."""

from typing import Any

import pytest

from converter.recipe.conversion_recipe import ConversionRecipe
from converter.recipe.recipe_options import RecipeOptions
from converter.recipe.recipes import RECIPES, make_recipe
from converter.solvers.native import solver_library
from converter.solvers.registry import SOLVERS, SolverEntry, choose_solver
from formats.errors import RecipeError
from formats.files.log_once import warn_once


def test_named_recipes_use_the_packings_of_the_design() -> None:
    experts = {name: recipe.gate_up for name, recipe in RECIPES.items()}
    assert {name for name, recipe in RECIPES.items() if recipe.down != recipe.gate_up} == {
        "2bit-down3"
    }
    assert RECIPES["2bit-down3"].down == RECIPES["3bit"].down
    assert experts == {
        "2bit": "tile32-q2-g16-s4",
        "2bit-down3": "tile32-q2-g16-s4",
        "3bit": "tile32-q3-g32-s4",
        "4bit": "tile32-q4-g64-s8",
        "2bit-scalar": "tile32-q2-g16-s4",
        "3bit-scalar": "tile32-q3-g32-s4",
        "paper-2bit": "tile32-q2-g16-s8",
        "paper-3bit": "tile32-q3-g64-s8",
        "16bit": "none",
    }
    assert {recipe.attention for name, recipe in RECIPES.items() if name != "16bit"} == {
        "tile32-q4-g64-s8"
    }


def test_plain_recipes_calibrate_and_the_papers_do_not() -> None:
    assert {
        name: (recipe.solver, recipe.recorded.options.get("calibrate"))
        for name, recipe in RECIPES.items()
    } == {
        "2bit": ("feedback", "builtin"),
        "2bit-down3": ("feedback", "builtin"),
        "3bit": ("feedback", "builtin"),
        "4bit": ("feedback", "builtin"),
        "2bit-scalar": ("feedback", "builtin"),
        "3bit-scalar": ("feedback", "builtin"),
        "paper-2bit": ("hqq", None),
        "paper-3bit": ("hqq", None),
        "16bit": ("none", None),
    }


@pytest.mark.parametrize(
    ("name", "calibrate", "solver"),
    [("2bit", "none", "refit"), ("paper-2bit", "none", "hqq"), ("2bit", "random", "feedback")],
)
def test_calibration_chooses_the_solver(name: str, calibrate: str, solver: str) -> None:
    assert make_recipe(name, calibrate=calibrate).solver == solver


def test_without_the_native_library_the_default_is_hqq_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(solver_library, "available", lambda: False)
    warn_once.cache_clear()
    chosen = [make_recipe("2bit"), make_recipe("3bit")]
    assert [(recipe.solver, recipe.recorded.options) for recipe in chosen] == [("hqq", {})] * 2
    assert caplog.text.count("without calibration") == 1
    assert make_recipe("2bit", solver="feedback").solver == "feedback"


@pytest.mark.parametrize("calibrated", [True, False])
def test_an_entry_in_the_registry_is_all_that_a_new_solver_needs(
    monkeypatch: pytest.MonkeyPatch, calibrated: bool
) -> None:
    entry = SolverEntry("new", "converter.solvers.plain_rows:NoSolver", calibrated)
    monkeypatch.setitem(SOLVERS, "new", entry)
    recipe = make_recipe("2bit", solver="new")
    assert (recipe.solver, recipe.options.calibration is not None) == ("new", calibrated)
    assert choose_solver("new").version == "none"


def test_name_of_a_recipe_is_that_of_its_packings() -> None:
    assert make_recipe("2bit", solver="hqq").name == "2bit"
    assert make_recipe("2bit", calibrate="random").name == "2bit"
    assert make_recipe("paper-2bit", solver="refit").name == "custom"


def test_the_name_that_the_user_gave_wins_over_another_name_of_the_same_packings() -> None:
    assert make_recipe("2bit-scalar", calibrate="none").name == "2bit-scalar"
    assert make_recipe("2bit-scalar", bits=3).name == "3bit"
    assert make_recipe("2bit-down3", down="tile32-q2-g16-s4").name == "2bit"


def test_bits_choose_the_packing() -> None:
    assert make_recipe(bits=3).gate_up == "tile32-q3-g32-s4"
    assert make_recipe(bits=3, group_size=64).down == "tile32-q3-g64-s8"


def test_options_that_add_up_to_a_named_recipe_get_its_name() -> None:
    assert make_recipe("2bit", bits=4) == RECIPES["4bit"]


def test_down_may_have_a_packing_of_its_own() -> None:
    recipe = make_recipe("2bit", down="tile32-q4-g64-s8")
    assert (recipe.name, recipe.gate_up, recipe.down) == (
        "custom",
        "tile32-q2-g16-s4",
        "tile32-q4-g64-s8",
    )


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"name": "5bit"}, "5bit"),
        ({"bits": 5}, "5 bits"),
        ({"bits": 4, "group_size": 16}, "groups of 16"),
        ({"attn_bits": 3}, "--attn-bits 3"),
        ({"head_bits": 8}, "--head-bits 8"),
        ({"solver": "magic"}, "magic"),
        ({"down": "q9"}, "q9"),
    ],
)
def test_what_does_not_exist_is_refused_by_name(options: dict[str, object], word: str) -> None:
    with pytest.raises(RecipeError, match=word):
        make_recipe(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"calibrate": "none"},
        {"rules": ["0-3,5:1/down=3bit", "*=16bit"], "down_width": "full"},
        {"target_bpw": 2.7, "down_width": 1024},
        {"bits": 16, "attn_bits": 16},
    ],
    ids=str,
)
def test_recipe_that_is_read_from_an_index_is_the_one_that_was_recorded(
    settings: dict[str, Any],
) -> None:
    recipe = make_recipe(**settings)
    assert ConversionRecipe.read(recipe.recorded) == recipe


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"calibrate": "magic", "calibration_tokens": 1024}, "calibrate is 'magic'"),
        ({"calibrate": "builtin"}, "calibration_tokens is None"),
        ({"calibrate": "builtin", "calibration_tokens": True}, "calibration_tokens is True"),
        ({"target_bpw": "much"}, "target_bpw is 'much'"),
        ({"down_width": 0}, "down_width is 0"),
        ({"down_width": "half"}, "down_width is 'half'"),
        ({"rule.x": "0=3bit"}, r"rule\.x is '0=3bit'"),
        ({"rule.1": 3}, r"rule\.1 is 3"),
        ({"rule.1": "0=3bit,1=3bit"}, "one bit rule"),
        ({"rule.1": "nonsense"}, "'nonsense' is no rule"),
    ],
    ids=str,
)
def test_option_of_an_index_that_means_nothing_is_refused_by_name(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        RecipeOptions.read(options)


def test_option_that_this_release_does_not_know_is_left_out() -> None:
    assert RecipeOptions.read({"from_a_later_release": 7}) == RecipeOptions()
