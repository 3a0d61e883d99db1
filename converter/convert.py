"""Converts a checkpoint in one call: open, plan, convert."""

from collections.abc import Sequence
from pathlib import Path

from converter.checkpoint.adapters.adapter_folder import AdapterFolder
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
    adapters: Sequence[AdapterFolder] = (),
) -> Converted:
    """Convert the checkpoint in a folder or Hub repository into folder `out`.

    adapters: merged into the weights first, in this order. Continues an earlier run that stopped.
    Memory is bounded by workers × one expert, with calibration by its tokens' activations, and has
    the adapters. The result depends only on weights, adapters, recipe, calibration text, codec and
    code version. Raises SourceError, HubError, OutputError, PathError,
    DoesNotFitError; no finished work is lost.
    """
    with Checkpoint(source, adapters) as checkpoint:
        plan = plan_conversion(checkpoint, recipe, options or ConvertOptions(), out)
        return convert(plan, progress)
