"""Recipes: which packing and solver for which weights. Data, not code; a user may combine their
own.
"""

import functools
import logging
import math
from collections.abc import Sequence

from msgspec.structs import replace

from converter.calibration.calibration_text import DEFAULT_TOKENS, FEWEST_TOKENS, KINDS
from converter.calibration.layer_statistics import DOWN_BLOCK
from converter.recipe.bit_rules import BY_BITS, UNPACKED, parse_rules
from converter.recipe.conversion_recipe import ConversionRecipe
from converter.recipe.recipe_options import Calibration, DownWidth, RecipeOptions
from converter.solvers.native import solver_library
from converter.solvers.registry import NO_SOLVER, SOLVERS
from formats.errors import RecipeError
from formats.packing import ALL_PACKINGS, PACKINGS

DEFAULT_RECIPE = "2bit"
CALIBRATED_SOLVER = "feedback"
UNCALIBRATED_SOLVER = "refit"
_CALIBRATED = RecipeOptions(Calibration("builtin", DEFAULT_TOKENS))
_ATTENTION = "tile32-q4-g64-s8"

RECIPES: dict[str, ConversionRecipe] = {
    name: ConversionRecipe(
        name, BY_BITS[gate_up], BY_BITS[down], _ATTENTION, CALIBRATED_SOLVER, options=_CALIBRATED
    )
    for name, gate_up, down in (
        ("2bit", 2, 2),
        ("2bit-down3", 2, 3),
        ("3bit", 3, 3),
        ("4bit", 4, 4),
    )
} | {
    name: ConversionRecipe(name, experts, experts, _ATTENTION, "hqq")
    for name, experts in {
        "paper-2bit": "tile32-q2-g16-s8",
        "paper-3bit": "tile32-q3-g64-s8",
    }.items()
}
RECIPES["16bit"] = ConversionRecipe("16bit", UNPACKED, UNPACKED, UNPACKED, NO_SOLVER, UNPACKED)

_log = logging.getLogger(__name__)


def make_recipe(
    name: str = DEFAULT_RECIPE,
    *,
    bits: int | None = None,
    attn_bits: int | None = None,
    head_bits: int | None = None,
    group_size: int | None = None,
    gate_up: str | None = None,
    down: str | None = None,
    solver: str | None = None,
    calibrate: str | None = None,
    calibration_tokens: int | None = None,
    rules: Sequence[str] = (),
    target_bpw: float | None = None,
    down_width: int | str | None = None,
) -> ConversionRecipe:
    """The named recipe with what the options change: expert bits and group size, or packings by
    name.

    `attn_bits` and `head_bits` are 4; these and `bits` may be 16, for as in the source. `calibrate`
    is a key of `converter.calibration.calibration_text.KINDS`; calibration and the solver feedback
    imply each other, where only the solver is given, the text is the builtin one, and without
    calibration the solver is refit (the paper's recipes keep hqq). Where the native library is
    missing, a recipe that would calibrate by itself takes hqq; where all experts are as in the
    source, none calibrates by itself, and where everything is, there is no solver. `rules` as
    converter/recipe/bit_rules.py has them; with `target_bpw` calibration chooses them. `down_width`
    is "full", or a multiple of 256: columns of down that make up for each other's errors.
    RecipeError names the option and what there is.
    """
    if name not in RECIPES:
        raise RecipeError(f"recipe {name!r} is unknown; known are {', '.join(RECIPES)}")
    base = RECIPES[name]
    own = base.gate_up, base.down
    of_gate_up, of_down = (_experts_packing(bits, group_size, packing) for packing in own)
    attention = _trunk_packing("--attn-bits", attn_bits, base.attention)
    head = _trunk_packing("--head-bits", head_bits, base.head)
    parsed = [rule for text in rules for rule in parse_rules(text)]
    packings = gate_up or of_gate_up, down or of_down
    for packing in packings:
        if packing not in (UNPACKED, *ALL_PACKINGS):
            raise RecipeError(
                f"packing {packing!r} is unknown; known are {', '.join(ALL_PACKINGS)}"
            )
    quantized = not PACKINGS.keys().isdisjoint((*packings, *(rule.packing for rule in parsed)))
    if solver not in (None, NO_SOLVER, *SOLVERS):
        raise RecipeError(f"solver {solver!r} is unknown; known are {', '.join(SOLVERS)}")
    if calibrate not in (None, *KINDS):
        raise RecipeError(f"--calibrate {calibrate}: known are {', '.join(KINDS)}")
    chosen_solver, calibration = NO_SOLVER, None
    if quantized or not attention == head == UNPACKED:
        chosen_solver = solver or _solver(base.solver, quantized, calibrate, calibration_tokens)
        calibration = _calibration(chosen_solver, calibrate, calibration_tokens)
    target = None if target_bpw is None else _target(target_bpw, chosen_solver, rules, packings)
    width = DOWN_BLOCK if down_width is None else _down_width(down_width, chosen_solver)
    options = RecipeOptions(calibration, target, width, tuple(parsed))
    chosen = ConversionRecipe(name, *packings, attention, chosen_solver, head, options)
    return chosen if chosen == base else _named_by_contents(chosen)


def _solver(of_recipe: str, experts: bool, calibrate: str | None, tokens: int | None) -> str:
    """The solver where none is asked for; experts: whether some are quantized."""
    if calibrate not in (None, "none"):
        return CALIBRATED_SOLVER
    if of_recipe not in (CALIBRATED_SOLVER, NO_SOLVER):
        return of_recipe
    if calibrate == "none":
        return UNCALIBRATED_SOLVER
    if tokens is None and not solver_library.available():
        _say_once()
        return "hqq"
    # For attention alone the passes through all experts are not worth their time.
    return CALIBRATED_SOLVER if experts or tokens is not None else UNCALIBRATED_SOLVER


@functools.cache
def _say_once() -> None:
    _log.warning(
        "%s; quantizing by hqq without calibration, which does worse. --solver feedback calibrates in torch, many times"
        " slower",
        solver_library.describe(),
    )


def _calibration(solver: str, calibrate: str | None, tokens: int | None) -> Calibration | None:
    """The recipe's calibration; None without one."""
    if solver == NO_SOLVER:
        raise RecipeError(
            "the solver none quantizes nothing", "choose another, or 16 bits of everything"
        )
    if solver != CALIBRATED_SOLVER:
        if calibrate not in (None, "none") or tokens is not None:
            raise RecipeError(
                f"the solver {solver} uses no calibration", f"--solver {CALIBRATED_SOLVER} does"
            )
        return None
    if calibrate == "none":
        raise RecipeError(f"the solver {solver} needs calibration", "--solver refit does without")
    tokens = DEFAULT_TOKENS if tokens is None else tokens
    if tokens < FEWEST_TOKENS:
        raise RecipeError(
            f"--calibration-tokens {tokens}: at least {FEWEST_TOKENS}", f"{DEFAULT_TOKENS} do well"
        )
    return Calibration(calibrate or "builtin", tokens)


def _target(bits: float, solver: str, rules: Sequence[str], packings: tuple[str, str]) -> float:
    if not PACKINGS.keys() >= set(packings):
        raise RecipeError(
            "target-bpw: gives more bits to layers of quantized experts, not to 16",
            "begin with 2bit",
        )
    if not (math.isfinite(bits) and bits > 0):
        raise RecipeError(f"target-bpw {bits}: expected are bits a weight, such as 2.7")
    if rules:
        raise RecipeError(
            "target-bpw and rules of bits: give one of them", "target-bpw chooses the rules itself"
        )
    if solver != CALIBRATED_SOLVER:
        raise RecipeError(
            f"target-bpw: the solver {solver} has no calibration to choose bits by",
            f"use --solver {CALIBRATED_SOLVER}",
        )
    return float(bits)


def _down_width(width: int | str, solver: str) -> DownWidth:
    if solver != CALIBRATED_SOLVER:
        raise RecipeError(
            f"down-width: the solver {solver} makes up for no errors",
            f"use --solver {CALIBRATED_SOLVER}",
        )
    if width == "full":
        return "full"
    if not (isinstance(width, int) and width > 0 and width % 256 == 0):
        raise RecipeError(f"down-width {width}: expected is a multiple of 256, or full")
    return width


def _trunk_packing(option: str, bits: int | None, default: str) -> str:
    if bits not in (None, 4, 16):
        raise RecipeError(f"{option} {bits}: there are 4 bits, or 16 for as it is in the source")
    return {None: default, 4: "tile32-q4-g64-s8", 16: UNPACKED}[bits]


def _experts_packing(bits: int | None, group_size: int | None, default: str) -> str:
    if bits is None and group_size is None:
        return default
    bits = bits or (16 if default == UNPACKED else PACKINGS[default].nbits)
    if bits == 16 and group_size is None:
        return UNPACKED
    fitting = [
        p for p in PACKINGS.values() if p.nbits == bits and group_size in (None, p.group_size)
    ]
    if not fitting:
        known = ", ".join(f"{p.nbits} bits in groups of {p.group_size}" for p in PACKINGS.values())
        raise RecipeError(
            f"no packing has {bits} bits in groups of {group_size}; there are {known}, and 16 without"
        )
    preferred = BY_BITS[bits]
    return preferred if any(p.name == preferred for p in fitting) else fitting[0].name


def _named_by_contents(recipe: ConversionRecipe) -> ConversionRecipe:
    """A recipe of a named one's packings has its name, the paper's only with its solver; any other
    is called custom, and one with a target by that.
    """
    if recipe.options.target_bpw is not None:
        return replace(recipe, name=f"{recipe.options.target_bpw:g}bpw")
    if recipe.options.rules:
        return replace(recipe, name="custom")
    for known in RECIPES.values():
        named = replace(recipe, name=known.name)
        by_paper = known.solver != CALIBRATED_SOLVER
        if replace(named, solver=known.solver, options=known.options) == known and (
            not by_paper or recipe.solver == known.solver
        ):
            return named
    return replace(recipe, name="custom")
