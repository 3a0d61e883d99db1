"""Spending a budget of bits: more of them for the layers and projections where an error costs most."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from converter.recipe.bit_rules import BY_BITS, PROJECTIONS, rule_for
from converter.recipe.conversion_recipe import ConversionRecipe
from formats.errors import RecipeError
from formats.expert import ExpertLayout
from formats.index import Architecture
from formats.packing import PACKINGS

Errors = Sequence[dict[str, dict[str, float]]]
"""Of each layer: projection -> packing -> what its error costs, in any unit."""

_LAYERS_A_RULE = 64


@dataclass(frozen=True)
class _Step:
    """A projection of a layer, and a packing that it may have instead of the one it has."""

    layer: int
    projection: str
    packing: str


def ladder(recipe: ConversionRecipe) -> dict[str, list[str]]:
    """For each projection the packings to choose from: the recipe's own, and those of more bits."""
    own = {projection: getattr(recipe, projection) for projection in PROJECTIONS}
    return {
        p: [o, *(name for bits, name in BY_BITS.items() if bits > PACKINGS[o].nbits)]
        for p, o in own.items()
    }


def choose_bits(
    recipe: ConversionRecipe, architecture: Architecture, errors: Errors
) -> ConversionRecipe:
    """`recipe`, whose option target_bpw says how many bits, with the rules that lessen `errors`
    most within them.

    Greedy: from the recipe's own packings on, the change that gains most for a byte and still fits
    comes first; of equal ones that of the lowest layer, gate_up before down. RecipeError if no
    choice takes so many bits.
    """
    choices, left = ladder(recipe), _budget_bytes(recipe, architecture)
    sizes = {
        p: {name: _projection_bytes(architecture, p, name) for name in names}
        for p, names in choices.items()
    }
    chosen = [{p: names[0] for p, names in choices.items()} for _ in errors]

    def rate(step: _Step) -> float:
        """What a byte gains; 0 for a step that does not fit or is none."""
        now = chosen[step.layer][step.projection]
        added = sizes[step.projection][step.packing] - sizes[step.projection][now]
        found = errors[step.layer][step.projection]
        return (found[now] - found[step.packing]) / added if 0 < added <= left else 0.0

    steps = [
        _Step(layer, p, name)
        for layer in range(len(errors))
        for p, names in choices.items()
        for name in names[1:]
    ]
    while (best := max(steps, key=rate, default=None)) and rate(best) > 0:
        now = chosen[best.layer][best.projection]
        left -= sizes[best.projection][best.packing] - sizes[best.projection][now]
        chosen[best.layer][best.projection] = best.packing
    rules = []
    for projection, names in choices.items():
        for name in names[1:]:
            layers = [n for n, packings in enumerate(chosen) if packings[projection] == name]
            parts = [layers[i : i + _LAYERS_A_RULE] for i in range(0, len(layers), _LAYERS_A_RULE)]
            rules += [rule_for(part, projection, name) for part in parts]
    # A rule in any case: it says that the choice was made.
    rules = rules or [rule_for((), "down", recipe.down)]
    return replace(recipe, options=replace(recipe.options, rules=tuple(rules)))


def likely_bits(recipe: ConversionRecipe, architecture: Architecture) -> ConversionRecipe:
    """A recipe whose rules are yet to be chosen, with some that take about as many bytes; any other
    as it is.
    """
    if not recipe.options.rules_are_open:
        return recipe
    errors = {
        p: {name: 4.0 ** -PACKINGS[name].nbits for name in names}
        for p, names in ladder(recipe).items()
    }
    return choose_bits(recipe, architecture, [errors] * architecture.expert_layers)


def _budget_bytes(recipe: ConversionRecipe, architecture: Architecture) -> int:
    """What all layers' experts may take beyond the recipe's own packings, for one expert of each
    layer.
    """
    target, choices = recipe.options.target_bpw, ladder(recipe)
    if target is None:
        raise ValueError(f"the recipe {recipe.name} has no target of bits")
    weights = 3 * architecture.hidden_size * architecture.intermediate_size
    least, most = (
        sum(_projection_bytes(architecture, p, names[at]) for p, names in choices.items())
        for at in (0, -1)
    )
    if not 8 * least <= target * weights <= 8 * most:
        raise RecipeError(
            f"target-bpw {target:g}: with this model's sizes, packings from {recipe.gate_up} and {recipe.down} on take"
            f" {8 * least / weights:.3f} to {8 * most / weights:.3f} bits a weight",
            "choose a target between them, or another recipe to begin with",
        )
    return math.floor((target * weights / 8 - least) * architecture.expert_layers)


def _projection_bytes(architecture: Architecture, projection: str, packing: str) -> int:
    layout = ExpertLayout.from_names(architecture, packing, packing)
    return layout.gate_up_bytes if projection == "gate_up" else layout.down_bytes
