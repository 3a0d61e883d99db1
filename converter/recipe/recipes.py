"""The named recipes, and recipes that options change."""

import math
from collections.abc import Sequence

from msgspec.structs import replace

from converter.calibration.calibration_text import DEFAULT_TOKENS, KINDS, MIN_TOKENS
from converter.calibration.layer_statistics import DOWN_BLOCK
from converter.recipe.bit_rules import BY_BITS, SCALAR, UNPACKED, parse_rules
from converter.recipe.conversion_recipe import ConversionRecipe
from converter.recipe.recipe_options import Calibration, DownWidth, RecipeOptions
from converter.solvers.native import solver_library
from converter.solvers.registry import NO_SOLVER, SOLVERS
from formats.errors import RecipeError
from formats.files.log_once import warn_once
from formats.packing import ALL_PACKINGS, PACKINGS

DEFAULT_RECIPE = "2bit"
CALIBRATED_SOLVER = "feedback"
"""Default solver with calibration."""
UNCALIBRATED_SOLVER = "refit"
"""Default solver without calibration."""
_CALIBRATED = RecipeOptions(Calibration("builtin", DEFAULT_TOKENS))
_TRUNK_PACKING = "tile32-q4-g64-s8"

RECIPES: dict[str, ConversionRecipe] = {
    name: ConversionRecipe(
        name,
        gate_up,
        down,
        _TRUNK_PACKING,
        CALIBRATED_SOLVER,
        options=_CALIBRATED,
    )
    for name, gate_up, down in (
        ("2bit", BY_BITS[2], BY_BITS[2]),
        ("2bit-down3", BY_BITS[2], BY_BITS[3]),
        ("3bit", BY_BITS[3], BY_BITS[3]),
        ("4bit", BY_BITS[4], BY_BITS[4]),
        *((name, packing, packing) for name, packing in SCALAR.items()),
    )
} | {
    name: ConversionRecipe(name, experts, experts, _TRUNK_PACKING, "hqq")
    for name, experts in {
        "paper-2bit": "tile32-q2-g16-s8",
        "paper-3bit": "tile32-q3-g64-s8",
    }.items()
}
RECIPES["16bit"] = ConversionRecipe("16bit", UNPACKED, UNPACKED, UNPACKED, NO_SOLVER, UNPACKED)


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
    """Return the recipe `name` with the changes that the other arguments ask for.

    bits, group_size: of the experts' packings; bits 16 leaves them as in the source. gate_up, down:
    packings by name. attn_bits, head_bits: 4, or 16 for as in the source. solver: a key of SOLVERS.
    calibrate: one of KINDS. rules: see converter/recipe/bit_rules.py. target_bpw: bits per expert
    weight; calibration chooses the rules. down_width: "full" or a multiple of 256, columns of down
    that compensate each other's errors.

    Solver and calibration imply each other: calibration needs a calibrated solver, and such a
    solver calibrates with the builtin text by default. Without calibration the solver is refit; the
    paper's recipes keep hqq. A default recipe uses hqq if the native library is missing. It does
    not calibrate if only the trunk is quantized, and has no solver if nothing is.

    Raises RecipeError with the invalid argument and the valid values.
    """
    if name not in RECIPES:
        raise RecipeError(f"recipe {name!r} is unknown; known are {', '.join(RECIPES)}")
    base = RECIPES[name]
    attention = _trunk_packing("--attn-bits", attn_bits, base.attention)
    head = _trunk_packing("--head-bits", head_bits, base.head)
    by_bits = [_experts_packing(bits, group_size, p) for p in (base.gate_up, base.down)]
    packings = (gate_up or by_bits[0], down or by_bits[1])
    parsed = [rule for text in rules for rule in parse_rules(text)]
    for packing in packings:
        if packing not in (UNPACKED, *ALL_PACKINGS):
            raise RecipeError(
                f"packing {packing!r} is unknown; known are {', '.join(ALL_PACKINGS)}"
            )
    if solver not in (None, NO_SOLVER, *SOLVERS):
        raise RecipeError(f"solver {solver!r} is unknown; known are {', '.join(SOLVERS)}")
    if calibrate not in (None, *KINDS):
        raise RecipeError(f"--calibrate {calibrate}: known are {', '.join(KINDS)}")
    experts = not PACKINGS.keys().isdisjoint((*packings, *(rule.packing for rule in parsed)))
    chosen_solver = NO_SOLVER
    calibration = None
    if experts or not attention == head == UNPACKED:
        chosen_solver = solver or _solver(base.solver, experts, calibrate, calibration_tokens)
        calibration = _calibration(chosen_solver, calibrate, calibration_tokens)
    target = None if target_bpw is None else _target(target_bpw, chosen_solver, rules, packings)
    width = DOWN_BLOCK if down_width is None else _down_width(down_width, chosen_solver)
    options = RecipeOptions(calibration, target, width, tuple(parsed))
    recipe = ConversionRecipe(name, *packings, attention, chosen_solver, head, options)
    return recipe if recipe == base else _with_name(recipe)


def _solver(default: str, experts: bool, calibrate: str | None, tokens: int | None) -> str:
    """Return the solver if the user names none.

    default: the named recipe's solver. experts: True if some experts are quantized.
    """
    if calibrate not in (None, "none"):
        return CALIBRATED_SOLVER
    if default not in (CALIBRATED_SOLVER, NO_SOLVER):
        return default
    if calibrate == "none":
        return UNCALIBRATED_SOLVER
    if tokens is None and not solver_library.available():
        warn_once(
            f"{solver_library.describe()}; quantizing with hqq without calibration, errors are"
            f" larger. --solver {CALIBRATED_SOLVER} calibrates in torch, many times slower"
        )
        return "hqq"
    # Calibration passes through all experts; for attention alone this is not worth the time.
    return CALIBRATED_SOLVER if experts or tokens is not None else UNCALIBRATED_SOLVER


def _calibrated(solver: str) -> bool:
    return solver in SOLVERS and SOLVERS[solver].calibrated


def _calibration(solver: str, calibrate: str | None, tokens: int | None) -> Calibration | None:
    """Return the recipe's calibration; None without one."""
    if solver == NO_SOLVER:
        raise RecipeError(
            "the solver none quantizes nothing", "choose another --solver, or --recipe 16bit"
        )
    if not _calibrated(solver):
        if calibrate not in (None, "none") or tokens is not None:
            raise RecipeError(
                f"the solver {solver} uses no calibration", f"use --solver {CALIBRATED_SOLVER}"
            )
        return None
    if calibrate == "none":
        raise RecipeError(
            f"the solver {solver} needs calibration", f"use --solver {UNCALIBRATED_SOLVER}"
        )
    tokens = DEFAULT_TOKENS if tokens is None else tokens
    if tokens < MIN_TOKENS:
        raise RecipeError(
            f"--calibration-tokens {tokens}: at least {MIN_TOKENS} are needed",
            f"use {DEFAULT_TOKENS}",
        )
    return Calibration(calibrate or "builtin", tokens)


def _target(bits: float, solver: str, rules: Sequence[str], packings: tuple[str, str]) -> float:
    if not PACKINGS.keys() >= set(packings):
        raise RecipeError(
            "target-bpw: needs a recipe that quantizes all experts", "start from --recipe 2bit"
        )
    if not (math.isfinite(bits) and bits > 0):
        raise RecipeError(f"target-bpw {bits}: expected bits per weight, such as 2.7")
    if rules:
        raise RecipeError(
            "target-bpw and bit rules: give only one of them", "target-bpw chooses the rules itself"
        )
    if not _calibrated(solver):
        raise RecipeError(
            f"target-bpw: the solver {solver} has no calibration to choose bits with",
            f"use --solver {CALIBRATED_SOLVER}",
        )
    return float(bits)


def _down_width(width: int | str, solver: str) -> DownWidth:
    if not _calibrated(solver):
        raise RecipeError(
            f"down-width: the solver {solver} does not compensate errors",
            f"use --solver {CALIBRATED_SOLVER}",
        )
    if width == "full":
        return "full"
    if not (isinstance(width, int) and width > 0 and width % 256 == 0):
        raise RecipeError(f"down-width {width}: expected a multiple of 256, or full")
    return width


def _trunk_packing(option: str, bits: int | None, default: str) -> str:
    if bits not in (None, 4, 16):
        raise RecipeError(f"{option} {bits}: expected 4, or 16 for as in the source")
    return {None: default, 4: _TRUNK_PACKING, 16: UNPACKED}[bits]


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
            f"no packing has {bits} bits in groups of {group_size};"
            f" known are {known}, and 16 bits without groups"
        )
    preferred = BY_BITS[bits]
    return preferred if any(p.name == preferred for p in fitting) else fitting[0].name


def _with_name(recipe: ConversionRecipe) -> ConversionRecipe:
    """Return the recipe under the name that its contents have.

    A target of bits gives the name. Otherwise it is that of a named recipe with the same packings
    (for a recipe of the paper also the same solver), or custom. Of two, the user's own name wins.
    """
    if recipe.options.target_bpw is not None:
        return replace(recipe, name=f"{recipe.options.target_bpw:g}bpw")
    if recipe.options.rules:
        return replace(recipe, name="custom")
    for known in (RECIPES[recipe.name], *RECIPES.values()):
        renamed = replace(recipe, name=known.name)
        fixed_solver = known.solver != CALIBRATED_SOLVER
        if replace(renamed, solver=known.solver, options=known.options) == known and (
            not fixed_solver or recipe.solver == known.solver
        ):
            return renamed
    return replace(recipe, name="custom")
