"""Converts a checkpoint in one call: open, plan, convert."""

from pathlib import Path

from converter.checkpoint.shards.hub_model import HubModel
from converter.checkpoint.source import Checkpoint
from converter.conversion.flow import Converted, convert
from converter.conversion.plan import plan_conversion
from converter.convert_options import ConvertOptions
from converter.recipe.conversion_recipe import ConversionRecipe
from formats.progress import Progress

__all__ = ["ConvertOptions", "Converted", "convert_checkpoint"]


def convert_checkpoint(
    source: Path | HubModel,
    out: Path,
    recipe: ConversionRecipe,
    options: ConvertOptions | None = None,
    progress: Progress | None = None,
) -> Converted:
    """Convert the checkpoint in a folder or Hub repository into folder `out`.

    Continues an earlier run that stopped. Memory is bounded by workers × one expert, and with
    calibration by its tokens' activations. The result depends only on weights, recipe, calibration
    text, codec and code version. Raises SourceError, HubError, OutputError, PathError,
    DoesNotFitError; no finished work is lost.
    """
    with Checkpoint(source) as checkpoint:
        plan = plan_conversion(checkpoint, recipe, options or ConvertOptions(), out)
        return convert(plan, progress)
