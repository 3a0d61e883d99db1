"""Flow of a conversion: check the folder, choose bits, run the units; or skip a complete folder."""

from dataclasses import dataclass
from typing import Any, Literal

from converter.conversion.identity import check_contents, check_same
from converter.conversion.plan import ConversionPlan
from converter.conversion.run import run_conversion
from converter.conversion.target_bits import with_chosen_bits
from converter.output.conversion_sizes import OutputPlan
from converter.output.output_folder import SOURCE_FOLDER, OutputFolder
from converter.recipe.conversion_recipe import ConversionRecipe
from converter.solvers.interface import CalibratedSolver
from converter.torch_threads import one_torch_thread
from formats.files.io_errors import translated
from formats.progress import Progress, no_progress


@dataclass(frozen=True)
class Converted:
    """Result of a conversion.

    quality: the value of quality.json; empty unless this run completed the folder.
    """

    done: Literal["converted", "already complete", "part"]
    plan: OutputPlan
    source_bytes: int
    quality: dict[str, Any]
    recipe: ConversionRecipe
    """The recipe, with the bit rules that calibration chose for its target."""


def convert(plan: ConversionPlan, progress: Progress | None = None) -> Converted:
    """Carry out a plan; continue where an earlier run stopped. The plan's checkpoint must be open.

    Raises SourceError, HubError, OutputError, PathError, DoesNotFitError. Finished work survives
    all of them.
    """
    with translated(plan.out, "used"):
        return _convert(plan, progress or no_progress)


def _convert(plan: ConversionPlan, progress: Progress) -> Converted:
    checkpoint = plan.checkpoint
    options = plan.options
    folder = OutputFolder(plan.out, plan.needs, force=options.force)
    try:
        if options.force or not (options.resume or folder.complete):
            folder.discard()
        if folder.complete:
            return _already_complete(plan, progress)
        checkpoint.fetch_into(folder.path / SOURCE_FOLDER)
        # Sums over a tensor depend on torch's number of threads, and so does the iteration where
        # hqq stops. Workers use the other cores.
        with one_torch_thread():
            if (
                plan.recipe.options.rules_are_open
                and plan.tokens
                and isinstance(plan.solver, CalibratedSolver)
            ):
                plan = with_chosen_bits(plan, plan.solver, plan.tokens, progress)
            quality = run_conversion(plan, progress)
        return Converted(
            "converted" if quality else "part",
            plan.output,
            checkpoint.n_bytes,
            quality or {},
            plan.recipe,
        )
    finally:
        folder.close()


def _already_complete(plan: ConversionPlan, progress: Progress) -> Converted:
    """Return the result for a complete folder; OutputError if it does not match the plan."""
    checkpoint = plan.checkpoint
    index = check_same(plan.out, checkpoint, plan.recipe, plan.options.codec, plan.tokens)
    check_contents(plan.out, checkpoint, index, progress)
    recipe = ConversionRecipe.read(index.recipe)
    plan = plan if recipe == plan.recipe else plan.with_recipe(recipe)
    return Converted("already complete", plan.output, checkpoint.n_bytes, {}, plan.recipe)
