"""A target of bits: spent where errors are largest, never exceeded, refused without a choice."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from converter.checkpoint.outline import Outline
from converter.output.conversion_sizes import OutputPlan, plan_output
from converter.recipe.bit_budget import choose_bits, likely_bits
from converter.recipe.conversion_recipe import ConversionRecipe
from converter.recipe.recipes import make_recipe
from formats.errors import RecipeError

Q2, Q3, Q4 = "tile32-q2-g16-s4", "tile32-q3-g32-s4", "tile32-q4-g64-s8"


@pytest.fixture(scope="module")
def outline(example_folder: Path) -> Outline:
    return Outline.of_folder(example_folder)


def errors(**largest: float) -> list[dict[str, dict[str, float]]]:
    """Return the errors of eight layers: 1 at 2 bits except as named; down_3 is down of layer 3."""
    every = {
        (layer, p): largest.get(f"{p}_{layer}", 1.0)
        for layer, p in product(range(8), ("gate_up", "down"))
    }
    return [
        {
            p: {Q2: every[n, p], Q3: every[n, p] / 4, Q4: every[n, p] / 16}
            for p in ("gate_up", "down")
        }
        for n in range(8)
    ]


def chosen(outline: Outline, target: float, found: Any) -> tuple[list[str], OutputPlan]:
    recipe = choose_bits(
        make_recipe(target_bpw=target, solver="feedback"), outline.architecture, found
    )
    return [rule.text for rule in recipe.options.rules], plan_output(outline, recipe)


def test_the_costliest_gets_bits_first(outline: Outline) -> None:
    rules, _ = chosen(outline, 3.6, errors(down_3=5, gate_up_6=8))
    assert rules == [f"6/gate_up={Q3}", f"3/down={Q3}"]


def test_what_is_costly_enough_gets_four_bits(outline: Outline) -> None:
    assert chosen(outline, 3.6, errors(down_3=500))[0][-1] == f"3/down={Q4}"


@pytest.mark.parametrize("target", [3.5, 3.7, 4.0, 4.34, 5.0, 5.8])
def test_bits_are_at_most_the_target_and_near_it(outline: Outline, target: float) -> None:
    _, plan = chosen(outline, target, errors(down_3=5, gate_up_6=8))
    assert target - 0.15 < plan.expert_bits <= target


def test_what_is_planned_before_the_choice_takes_about_as_many_bytes(outline: Outline) -> None:
    recipe = make_recipe(target_bpw=4.0, solver="feedback")
    assert plan_output(outline, recipe).expert_bits == pytest.approx(4.0, abs=0.1)
    other = make_recipe("3bit")
    assert likely_bits(other, outline.architecture) is other


def test_a_choice_that_changes_nothing_is_a_choice(outline: Outline) -> None:
    rules, plan = chosen(outline, 3.48, errors())
    assert rules == [f"*/down={Q2}"]
    assert plan.layouts == plan_output(outline, make_recipe("2bit")).layouts


def test_a_target_that_no_packings_reach_has_the_numbers(outline: Outline) -> None:
    for target in (2.7, 9.0):
        with pytest.raises(RecipeError, match=rf"target-bpw {target:g}: .*3\.472 to 5\.806 bits"):
            chosen(outline, target, errors())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_bpw": float("nan")}, "expected bits per weight"),
        ({"target_bpw": -1.0}, "expected bits per weight"),
        ({"target_bpw": 2.7, "rules": ["0=3bit"]}, "one of them"),
        ({"target_bpw": 2.7, "calibrate": "none"}, "solver refit"),
        ({"target_bpw": 2.7, "name": "paper-2bit"}, "solver hqq"),
    ],
)
def test_a_target_that_cannot_be_met_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        make_recipe(**settings)


def test_a_recipe_with_a_target_is_called_by_it() -> None:
    recipe: ConversionRecipe = make_recipe(target_bpw=2.7, solver="feedback")
    assert (recipe.name, recipe.recorded.options["target_bpw"]) == ("2.7bpw", 2.7)
