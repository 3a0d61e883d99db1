"""A converted folder that does not exist yet: its sizes, from config.json and a recipe alone."""

from dataclasses import dataclass
from pathlib import Path

from converter.checkpoint.outline import Outline
from converter.output.conversion_sizes import plan_output
from converter.recipe.conversion_recipe import ConversionRecipe
from formats.expert import ExpertLayout
from formats.index import Architecture
from formats.safetensors_header import TensorEntry


@dataclass(frozen=True)
class PlannedFolder:
    """The sizes of the folder that a conversion would write.

    layers: the experts' layouts, layers[layer][expert]. trunk: the trunk's tensors in file order.
    """

    folder: Path
    architecture: Architecture
    layers: list[list[ExpertLayout]]
    trunk: list[TensorEntry]

    @classmethod
    def plan(cls, folder: Path, recipe: ConversionRecipe) -> "PlannedFolder":
        """Plan the conversion of the checkpoint in `folder` by `recipe`; no shard is opened.

        Raises what `Outline.of_folder` and `plan_output` raise.
        """
        outline = Outline.of_folder(folder)
        plan = plan_output(outline, recipe)
        return cls(folder, outline.architecture, plan.layouts, plan.trunk_entries)

    def layout(self, layer: int, expert: int) -> ExpertLayout:
        """Return the layout of an expert."""
        return self.layers[layer][expert]
