"""A recipe as the converter uses it: packings, solver and typed options."""

from msgspec import Struct

from converter.recipe.bit_rules import UNPACKED
from converter.recipe.recipe_options import RecipeOptions
from formats.errors import RecipeError
from formats.index import Architecture, Recipe


class ConversionRecipe(Struct, frozen=True):
    """Names of the packings and of the solver; UNPACKED leaves weights as in the source."""

    name: str
    gate_up: str
    down: str
    attention: str
    solver: str
    head: str = UNPACKED
    options: RecipeOptions = RecipeOptions()

    @classmethod
    def read(cls, recorded: Recipe) -> "ConversionRecipe":
        """Return the recipe that an index records. Raises RecipeError with the invalid option."""
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
        """The recipe in the form that index and journal store."""
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
    """Return (gate_up, down) of each expert, [layer][expert]: packings or UNPACKED.

    Raises RecipeError for a rule about a layer or expert that the model does not have.
    """
    rules = recipe.options.rules
    layers = architecture.expert_layers
    experts = architecture.num_local_experts
    for rule in rules:
        for kind, ranges, count in (
            ("layer", rule.layers, layers),
            ("expert", rule.experts, experts),
        ):
            if ranges and (last := max(end for _, end in ranges)) >= count:
                raise RecipeError(
                    f"rule {rule.text}: there is no {kind} {last}, the last is {count - 1}"
                )

    def packing(layer: int, expert: int, projection: str) -> str:
        default: str = getattr(recipe, projection)
        matching = (r.packing for r in reversed(rules) if r.fits(layer, expert, projection))
        return next(matching, default)

    return [
        [
            (packing(layer, expert, "gate_up"), packing(layer, expert, "down"))
            for expert in range(experts)
        ]
        for layer in range(layers)
    ]
