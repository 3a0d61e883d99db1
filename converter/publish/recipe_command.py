"""The command that converts the source by the recipe of an index."""

import shlex

from converter.recipe.bit_rules import UNPACKED
from converter.recipe.conversion_recipe import ConversionRecipe
from converter.recipe.recipes import RECIPES
from converter.solvers.registry import NO_SOLVER
from formats.index import Index

CALIBRATION_TEXT = "calibration.txt"
"""Stands for a calibration text of the user, whose name no index has."""


def convert_line(index: Index) -> str:
    """Return the shell command. Raises RecipeError for options that this release cannot read."""
    source = index.source
    words = ["moe-convert", "convert"]
    if source.revision is None:
        words.append(f"./{source.name}")
    else:
        words += [source.name, "--revision", source.revision]
    for adapter in source.adapters:
        local = adapter.revision is None
        words.append("--adapter")
        words.append(f"./{adapter.name}" if local else f"{adapter.name}@{adapter.revision}")
    words += _recipe_words(ConversionRecipe.read(index.recipe))
    if (codec := index.layers[0].experts[0].codec) != "none":
        words += ["--codec", codec]
    return shlex.join(words)


def _recipe_words(recipe: ConversionRecipe) -> list[str]:
    """Return the options that make the recipe: a named one, and what differs from it."""
    names = [recipe.name] if recipe.name in RECIPES else RECIPES
    return min((_changes(recipe, name) for name in names), key=len)


def _changes(recipe: ConversionRecipe, name: str) -> list[str]:
    base = RECIPES[name]
    options = recipe.options
    words = ["--recipe", name]
    for option, packing, default in (
        ("--gate-up", recipe.gate_up, base.gate_up),
        ("--down", recipe.down, base.down),
    ):
        if packing != default:
            words += [option, packing]
    for option, packing, default in (
        ("--attn-bits", recipe.attention, base.attention),
        ("--head-bits", recipe.head, base.head),
    ):
        if packing != default:
            words += [option, "16" if packing == UNPACKED else "4"]
    # The solver none is no choice: it follows if nothing is quantized.
    if recipe.solver not in (base.solver, NO_SOLVER):
        words += ["--solver", recipe.solver]
    if options.calibration and options.calibration != base.options.calibration:
        kind = options.calibration.kind
        words += ["--calibrate", CALIBRATION_TEXT if kind == "file" else kind]
        words += ["--calibration-tokens", str(options.calibration.tokens)]
    if options.target_bpw is not None:
        # Calibration chooses the same rules again.
        words += ["--target-bpw", repr(options.target_bpw)]
    elif options.rules:
        words += ["--layer-bits", ",".join(rule.text for rule in options.rules)]
    if options.down_width != base.options.down_width:
        words += ["--down-width", str(options.down_width)]
    return words
