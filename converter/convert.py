"""Converting a checkpoint in one call: opened, planned, converted."""

from pathlib import Path

from converter.checkpoint.shards.hub_model import HubModel
from converter.checkpoint.source import Checkpoint
from converter.conversion.flow import Converted, convert
from converter.conversion.identity import Progress
from converter.conversion.plan import plan_conversion
from converter.convert_options import ConvertOptions
from converter.recipe.conversion_recipe import ConversionRecipe

__all__ = ["ConvertOptions", "Converted", "convert_checkpoint"]


def convert_checkpoint(
    source: Path | HubModel,
    out: Path,
    recipe: ConversionRecipe,
    options: ConvertOptions | None = None,
    progress: Progress | None = None,
) -> Converted:
    """Converts the checkpoint in a folder or Hub repository into folder `out`; goes on where an
    earlier run stopped.

    Memory stays bounded by workers × one expert, and with calibration by the activations of its
    tokens. The result depends on weights, recipe, calibration text, codec and code version only.
    Raises SourceError, HubError, OutputError, PathError, DoesNotFitError; after any of them nothing
    that was converted is lost.
    """
    with Checkpoint(source) as checkpoint:
        return convert(
            plan_conversion(checkpoint, recipe, options or ConvertOptions(), out), progress
        )
