"""Rules of bits: their syntax, the packings that follow from them, and refusals."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from converter.checkpoint.outline import Outline
from converter.convert import ConvertOptions, convert_checkpoint
from converter.recipe.bit_rules import as_ranges, parse_rules
from converter.recipe.conversion_recipe import ConversionRecipe, packings_by_expert
from converter.recipe.recipe_file import recipe_settings
from converter.recipe.recipes import make_recipe
from formats.errors import MoeConvertError, RecipeError
from formats.index import Architecture

Q2, Q3, Q4 = "tile32-q2-g16-s4", "tile32-q3-g32-s4", "tile32-q4-g64-s8"


@pytest.fixture(scope="module")
def architecture(example_folder: Path) -> Architecture:
    return Outline.of_folder(example_folder).architecture


def packings(architecture: Architecture, *rules: str) -> list[list[tuple[str, str]]]:
    return packings_by_expert(make_recipe(rules=rules), architecture)


def test_a_rule_counts_for_its_layers_experts_and_projection_only(
    architecture: Architecture,
) -> None:
    found = packings(architecture, "1-2,5=3bit,*:0,3-4/down=4bit")
    for layer, row in enumerate(found):
        base = Q3 if layer in (1, 2, 5) else Q2
        assert row == [(base, Q4 if expert in (0, 3, 4) else base) for expert in range(8)]


def test_a_rule_takes_the_packing_of_a_scalar_recipe(architecture: Architecture) -> None:
    assert packings(architecture, "2=3bit-scalar")[2][0] == (Q3, Q3)


def test_of_rules_that_fit_the_last_counts(architecture: Architecture) -> None:
    assert packings(architecture, "*=4bit,2/gate_up=3bit", "2/gate_up=2bit")[2][0] == (Q2, Q4)


def test_a_recipe_keeps_rules_as_options_with_the_packings_names_in_their_order() -> None:
    recipe = make_recipe(rules=[f"{layer}=3bit" for layer in range(11)]).recorded
    assert recipe.name == "custom"
    assert recipe.options["rule.11"] == f"10={Q3}"
    shuffled = replace(recipe, options=dict(sorted(recipe.options.items())))
    assert [rule.layers for rule in ConversionRecipe.read(shuffled).options.rules] == [
        ((layer, layer),) for layer in range(11)
    ]


def test_ranges_are_written_as_they_are_read() -> None:
    assert as_ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    (rule,) = parse_rules("0-2,5,7-8/down=3bit")
    assert [n for n in range(10) if rule.fits(n, 0, "down")] == [0, 1, 2, 5, 7, 8]


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("", "'' is no rule"),
        ("3bit", "'3bit' is no rule"),
        ("0-=3bit", "'0-=3bit' is no rule"),
        ("0=3bit,", "'' is no rule"),
        ("0=3bit;1=3bit", "no rule"),
        ("0=5bit", "'5bit' is unknown"),
        ("0/up=3bit", "projection 'up'"),
        ("3-1=3bit", "range 3-1 is empty"),
        (",".join(map(str, range(0, 400, 2))) + "=3bit", "at most 512"),
    ],
)
def test_what_is_no_rule_is_refused_by_name(rule: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        make_recipe(rules=[rule])


@pytest.mark.parametrize(
    ("rule", "words"), [("6-8=3bit", "no layer 8"), ("0:8=3bit", "no expert 8")]
)
def test_a_rule_about_what_the_model_lacks_is_refused_before_anything_is_written(
    example_folder: Path, tmp_path: Path, rule: str, words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        convert_checkpoint(
            example_folder, tmp_path / "out", make_recipe(rules=[rule]), ConvertOptions()
        )
    assert not (tmp_path / "out").exists()


def test_a_file_says_what_the_options_say(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"name": "3bit", "rules": ["0=4bit", "*/down=2bit"], "solver": "refit"}')
    assert make_recipe(**recipe_settings(str(file))) == make_recipe(
        "3bit", rules=["0=4bit,*/down=2bit"], solver="refit"
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"bit": 3}', "mine.json.*bit"),
        ('{"bits": "3"}', "mine.json.*bits"),
        ('{"rules": "0=3bit"}', "mine.json.*rules"),
        ('{"calibrate": "file"}', "cannot name the text"),
        ("[", "mine.json: not JSON"),
        ('{"bits": 3, "bits": 2}', "mine.json.*bits"),
    ],
)
def test_a_file_that_says_something_else_is_refused(
    tmp_path: Path, content: str, words: str
) -> None:
    (tmp_path / "mine.json").write_text(content)
    with pytest.raises(RecipeError, match=words):
        recipe_settings(str(tmp_path / "mine.json"))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(MoeConvertError, match=r"none\.json"):
        recipe_settings(str(tmp_path / "none.json"))
