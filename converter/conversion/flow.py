"""The flow of a conversion: the folder, the choice of bits, the run; or what is complete already."""

from dataclasses import dataclass
from typing import Any, Literal

from converter.conversion.identity import Progress, check_contents, check_same
from converter.conversion.plan import ConversionPlan
from converter.conversion.run import one_torch_thread, run_conversion
from converter.conversion.target_bits import with_chosen_bits
from converter.output.conversion_sizes import OutputPlan
from converter.output.output_folder import SOURCE_FOLDER, OutputFolder
from converter.recipe.conversion_recipe import ConversionRecipe
from converter.solvers.interface import CalibratedSolver
from formats.files.io_errors import translated


@dataclass(frozen=True)
class Converted:
    """What a conversion came to. quality: the value of quality.json; empty unless the conversion
    ended now.
    """

    done: Literal["converted", "already complete", "part"]
    plan: OutputPlan
    source_bytes: int
    quality: dict[str, Any]
    recipe: ConversionRecipe
    """With the rules of bits that were chosen for its target, if it has one."""


def convert(plan: ConversionPlan, progress: Progress | None = None) -> Converted:
    """Carries out a plan, whose checkpoint is open; goes on where an earlier run stopped.

    Raises SourceError, HubError, OutputError, PathError, DoesNotFitError; after any of them nothing
    that was converted is lost.
    """
    with translated(plan.out, "used"):
        return _convert(plan, progress or (lambda stage, done, total: None))


def _convert(plan: ConversionPlan, progress: Progress) -> Converted:
    checkpoint, options = plan.checkpoint, plan.options
    folder = OutputFolder(plan.out, plan.needs, force=options.force)
    try:
        if options.force or not (options.resume or folder.complete):
            folder.discard()
        if folder.complete:
            return _already_complete(plan, progress)
        checkpoint.fetch_into(folder.path / SOURCE_FOLDER)
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
    """What a complete folder is a conversion of; OutputError if that is not what the plan says."""
    checkpoint = plan.checkpoint
    index = check_same(plan.out, checkpoint, plan.recipe, plan.options.codec, plan.tokens)
    check_contents(plan.out, checkpoint, index, progress)
    recipe = ConversionRecipe.read(index.recipe)
    plan = plan if recipe == plan.recipe else plan.with_recipe(recipe)
    return Converted("already complete", plan.output, checkpoint.n_bytes, {}, plan.recipe)
