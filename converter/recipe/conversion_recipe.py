"""A recipe as the converter uses it: which packing and solver for which weights, with its options
typed.
"""

from msgspec import Struct

from converter.recipe.bit_rules import UNPACKED
from converter.recipe.recipe_options import RecipeOptions
from formats.errors import RecipeError
from formats.index import Architecture, Recipe


class ConversionRecipe(Struct, frozen=True):
    """How weights are quantized. Packings are names, or UNPACKED for as in the source."""

    name: str
    gate_up: str
    down: str
    attention: str
    solver: str
    head: str = UNPACKED
    options: RecipeOptions = RecipeOptions()

    @classmethod
    def read(cls, recorded: Recipe) -> "ConversionRecipe":
        """From an index. RecipeError naming the option that is not as `RecipeOptions` has it."""
        return cls(
            name=recorded.name,
            gate_up=recorded.gate_up,
            down=recorded.down,
            attention=recorded.attention,
            solver=recorded.solver,
            head=recorded.head,
            options=RecipeOptions.read(recorded.options),
        )

    @property
    def recorded(self) -> Recipe:
        """As the index and the journal have it."""
        return Recipe(
            name=self.name,
            gate_up=self.gate_up,
            down=self.down,
            attention=self.attention,
            solver=self.solver,
            head=self.head,
            options=self.options.recorded,
        )


def packings_by_expert(
    recipe: ConversionRecipe, architecture: Architecture
) -> list[list[tuple[str, str]]]:
    """(gate_up, down) of each expert of each layer, packings or UNPACKED.

    RecipeError for a rule about a layer or an expert that the model lacks.
    """
    rules = recipe.options.rules
    layers, experts = architecture.expert_layers, architecture.num_local_experts
    for rule in rules:
        for what, ranges, count in (
            ("layer", rule.layers, layers),
            ("expert", rule.experts, experts),
        ):
            if ranges and (last := max(end for _, end in ranges)) >= count:
                raise RecipeError(
                    f"rule {rule.text}: there is no {what} {last}, the last is {count - 1}"
                )

    def packing(layer: int, expert: int, projection: str) -> str:
        own: str = getattr(recipe, projection)
        return next((r.packing for r in reversed(rules) if r.fits(layer, expert, projection)), own)

    return [
        [
            (packing(layer, expert, "gate_up"), packing(layer, expert, "down"))
            for expert in range(experts)
        ]
        for layer in range(layers)
    ]
