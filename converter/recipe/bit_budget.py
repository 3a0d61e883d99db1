"""Choice of bits under a budget: more bits where an error costs most."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from converter.recipe.bit_rules import BY_BITS, PROJECTIONS, BitRule, rule_for
from converter.recipe.conversion_recipe import ConversionRecipe
from formats.errors import RecipeError
from formats.expert import ExpertLayout
from formats.index import Architecture
from formats.packing import PACKINGS

Errors = Sequence[dict[str, dict[str, float]]]
"""For each layer: projection -> packing -> cost of its error, in any unit."""

_LAYERS_PER_RULE = 64


@dataclass(frozen=True)
class _Step:
    """A change: a projection of a layer gets `packing` instead of its present one."""

    layer: int
    projection: str
    packing: str


def ladder(recipe: ConversionRecipe) -> dict[str, list[str]]:
    """Return each projection's packings to choose from: the recipe's, then those with more bits."""
    choices = {}
    for projection in PROJECTIONS:
        base: str = getattr(recipe, projection)
        more = [name for bits, name in BY_BITS.items() if bits > PACKINGS[base].nbits]
        choices[projection] = [base, *more]
    return choices


def choose_bits(
    recipe: ConversionRecipe, architecture: Architecture, errors: Errors
) -> ConversionRecipe:
    """Return `recipe` with rules that reduce `errors` within the budget of its option target_bpw.

    Greedy: starting from the recipe's packings, apply the change with the largest error reduction
    per byte that still fits. Ties go to the lowest layer, gate_up before down. Raises RecipeError
    if no choice of packings has that many bits.
    """
    choices = ladder(recipe)
    left_bytes = _budget_bytes(recipe, architecture)
    sizes = {
        p: {name: _projection_bytes(architecture, p, name) for name in names}
        for p, names in choices.items()
    }
    chosen = [{p: names[0] for p, names in choices.items()} for _ in errors]

    def added_bytes(step: _Step) -> int:
        size = sizes[step.projection]
        return size[step.packing] - size[chosen[step.layer][step.projection]]

    def rate(step: _Step) -> float:
        """Return the error reduction per byte; 0 for a step that does not fit or adds nothing."""
        added = added_bytes(step)
        costs = errors[step.layer][step.projection]
        reduction = costs[chosen[step.layer][step.projection]] - costs[step.packing]
        return reduction / added if 0 < added <= left_bytes else 0.0

    steps = [
        _Step(layer, p, name)
        for layer in range(len(errors))
        for p, names in choices.items()
        for name in names[1:]
    ]
    while (best := max(steps, key=rate, default=None)) and rate(best) > 0:
        left_bytes -= added_bytes(best)
        chosen[best.layer][best.projection] = best.packing
    # A recipe with no rules would count as not chosen yet.
    rules = _rules(choices, chosen) or [rule_for((), "down", recipe.down)]
    return replace(recipe, options=replace(recipe.options, rules=tuple(rules)))


def likely_bits(recipe: ConversionRecipe, architecture: Architecture) -> ConversionRecipe:
    """Return a recipe of about the final size, if calibration has yet to choose the rules.

    Its rules assume the same errors in each layer. Any other recipe is returned unchanged.
    """
    if not recipe.options.rules_are_open:
        return recipe
    errors = {
        p: {name: 4.0 ** -PACKINGS[name].nbits for name in names}
        for p, names in ladder(recipe).items()
    }
    return choose_bits(recipe, architecture, [errors] * architecture.expert_layers)


def _rules(choices: dict[str, list[str]], chosen: list[dict[str, str]]) -> list[BitRule]:
    """Return the rules for the packings that differ from the recipe's."""
    rules = []
    for projection, names in choices.items():
        for name in names[1:]:
            layers = [n for n, packings in enumerate(chosen) if packings[projection] == name]
            for begin in range(0, len(layers), _LAYERS_PER_RULE):
                rules.append(rule_for(layers[begin : begin + _LAYERS_PER_RULE], projection, name))
    return rules


def _budget_bytes(recipe: ConversionRecipe, architecture: Architecture) -> int:
    """Return the bytes beyond the recipe's packings, summed over one expert of each layer."""
    target = recipe.options.target_bpw
    choices = ladder(recipe)
    if target is None:
        raise ValueError(f"the recipe {recipe.name} has no target of bits")
    weights = 3 * architecture.hidden_size * architecture.intermediate_size
    least, most = (
        sum(_projection_bytes(architecture, p, names[at]) for p, names in choices.items())
        for at in (0, -1)
    )
    if not 8 * least <= target * weights <= 8 * most:
        raise RecipeError(
            f"target-bpw {target:g}: with this model's sizes, the packings {recipe.gate_up} and"
            f" {recipe.down} or larger have {8 * least / weights:.3f} to {8 * most / weights:.3f}"
            " bits per weight",
            "choose a target in this range, or another --recipe to start from",
        )
    return math.floor((target * weights / 8 - least) * architecture.expert_layers)


def _projection_bytes(architecture: Architecture, projection: str, packing: str) -> int:
    layout = ExpertLayout.from_names(architecture, packing, packing)
    return layout.gate_up_bytes if projection == "gate_up" else layout.down_bytes
