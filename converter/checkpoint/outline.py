"""A checkpoint as its config.json describes it, and what a recipe would make of it: no shard is
opened.
"""

from dataclasses import dataclass
from pathlib import Path

from converter.checkpoint.model_shape import ModelShape
from converter.checkpoint.shards.source_kinds import check_folder
from converter.checkpoint.source_tensors import Weight
from converter.output.conversion_sizes import plan_output
from converter.recipe.conversion_recipe import ConversionRecipe
from formats.config.checkpoint_config import read_config
from formats.expert import ExpertLayout
from formats.index import Architecture
from formats.safetensors_header import TensorEntry

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Outline:
    """The model, the tensors that are not experts, and the experts' dtype: for all config.json's,
    else bfloat16.
    """

    shape: ModelShape
    trunk: dict[str, Weight]
    expert_dtypes: set[str]

    @property
    def architecture(self) -> Architecture:
        """The model's numbers."""
        return self.shape.architecture

    @classmethod
    def of_folder(cls, folder: Path) -> "Outline":
        """From config.json in `folder`; SourceError unless it is of a model that this release
        converts.
        """
        check_folder(folder)
        config = read_config(folder)
        shape = ModelShape(config, str(folder / "config.json"))
        dtype = _DTYPES[config.get("dtype") or "bfloat16"]
        return cls(
            shape,
            {name: Weight(name, "", dtype, size, 0) for name, size in shape.trunk.items()},
            {dtype},
        )


@dataclass(frozen=True)
class PlannedFolder:
    """What a conversion would write: the layouts of the experts, layers[layer][expert], and the
    trunk's tensors.
    """

    folder: Path
    architecture: Architecture
    layers: list[list[ExpertLayout]]
    trunk: list[TensorEntry]

    @classmethod
    def of(cls, folder: Path, recipe: ConversionRecipe) -> "PlannedFolder":
        """Of the checkpoint in `folder` by `recipe`. SourceError as `Outline.of_folder`."""
        outline = Outline.of_folder(folder)
        plan = plan_output(outline, recipe)
        return cls(folder, outline.architecture, plan.layouts, plan.trunk_entries)

    def layout(self, layer: int, expert: int) -> ExpertLayout:
        """The sizes of an expert."""
        return self.layers[layer][expert]
