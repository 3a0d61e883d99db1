"""The plan of a conversion, complete before the first weight is read; a dry run makes the same."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from converter.calibration.calibration_text import CalibrationTokens, calibration_tokens
from converter.checkpoint.source import Checkpoint
from converter.checkpoint.source_tokenizer import check_source_tokenizer
from converter.conversion.identity import check_same, fingerprint, recorded_recipe
from converter.conversion.worker_count import choose_workers
from converter.convert_options import ConvertOptions
from converter.journal.journal_file import check_begun
from converter.output.conversion_sizes import OutputPlan, check_disk, plan_output
from converter.output.output_needs import OutputNeeds
from converter.output.output_probe import probe_output
from converter.output.source_side_files import side_files_of
from converter.recipe.conversion_recipe import ConversionRecipe
from converter.solvers.interface import Solver
from converter.solvers.registry import choose_solver
from formats import INDEX_NAME
from formats.files.io_errors import translated


@dataclass(frozen=True)
class ConversionPlan:
    """All decisions of a conversion. `checkpoint` is open; whoever opened it closes it."""

    checkpoint: Checkpoint
    recipe: ConversionRecipe
    options: ConvertOptions
    out: Path
    output: OutputPlan
    side_files: dict[str, Path]
    """Name of each file to copy -> its folder."""
    needs: OutputNeeds
    solver: Solver
    tokens: CalibrationTokens | None
    """Calibration tokens; None without calibration."""
    workers: int
    free_disk_bytes: int
    fingerprint: dict[str, Any]
    """Fields that must be equal for a resume."""

    @property
    def memory_bytes(self) -> int:
        """Estimated peak memory."""
        return self.output.memory_bytes(self.workers, self.solver)

    @property
    def layers(self) -> range:
        """Layers of experts to convert: all, or those of one part."""
        n = len(self.output.layouts)
        i, parts = self.options.part or (1, 1)
        return range(n * (i - 1) // parts, n * i // parts)

    def with_recipe(self, recipe: ConversionRecipe) -> "ConversionPlan":
        """Return the plan with a recipe whose bit rules are chosen."""
        return replace(
            self,
            recipe=recipe,
            output=plan_output(self.checkpoint, recipe),
            fingerprint=self.fingerprint | recorded_recipe(recipe),
        )


def plan_conversion(
    checkpoint: Checkpoint, recipe: ConversionRecipe, options: ConvertOptions, out: Path
) -> ConversionPlan:
    """Plan the conversion of `checkpoint` into folder `out`, and check what could stop it later.

    Raises RecipeError, SourceError, OutputError, DoesNotFitError. Writes only a temporary file,
    which it removes.
    """
    with translated(out, "used"):
        output = plan_output(checkpoint, recipe)
        side_files = side_files_of(checkpoint)
        calibration = recipe.options.calibration if output.last_quantized_layer >= 0 else None
        by_text = calibration is not None and calibration.kind != "random"
        tokenizer = check_source_tokenizer(checkpoint, needed=by_text)
        needs = OutputNeeds.for_plan(checkpoint, output, side_files, [options.calibration_file])
        probe_output(out, needs, force=options.force)
        free_disk_bytes = check_disk(output, out, options.codec, checkpoint.fetch_bytes)
        solver = choose_solver(recipe.solver)
        workers = choose_workers(output, solver, options)
        tokens = None
        if calibration:
            tokens = calibration_tokens(
                checkpoint,
                calibration.kind,
                calibration.tokens,
                options.calibration_file,
                tokenizer,
            )
        plan = ConversionPlan(
            checkpoint=checkpoint,
            recipe=recipe,
            options=options,
            out=out,
            output=output,
            side_files=side_files,
            needs=needs,
            solver=solver,
            tokens=tokens,
            workers=workers,
            free_disk_bytes=free_disk_bytes,
            fingerprint=fingerprint(checkpoint, recipe, options.codec, solver, tokens),
        )
        if not options.force:
            _check_earlier(plan)
        return plan


def _check_earlier(plan: ConversionPlan) -> None:
    """Raise OutputError if the folder holds another conversion, complete or unfinished."""
    if (plan.out / INDEX_NAME).exists():
        check_same(plan.out, plan.checkpoint, plan.recipe, plan.options.codec, plan.tokens)
    # With a target, the journal has the chosen rules, which this plan does not know yet.
    elif plan.options.resume and not plan.recipe.options.rules_are_open:
        check_begun(plan.out, plan.fingerprint)
