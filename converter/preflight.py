"""What can be known of a conversion before its first weight is read. A dry run and a conversion check the same."""

from dataclasses import dataclass
from pathlib import Path

from converter.bit_budget import TARGET
from converter.calibration_text import CalibrationTokens, calibration_tokens
from converter.convert_options import ConvertOptions
from converter.identity import check_same, fingerprint
from converter.journal import check_begun
from converter.output_needs import OutputNeeds
from converter.output_probe import probe_output
from converter.side_files import check_side_files
from converter.sizes import OutputPlan, check_disk, plan_output
from converter.solver import Solver
from converter.solvers import choose_solver
from converter.source import Checkpoint
from converter.source_tokenizer import check_source_tokenizer
from converter.worker_count import choose_workers
from formats import INDEX_NAME
from formats.index import Recipe


@dataclass(frozen=True)
class Preflight:
    """What was found.

    side_files: names of the files that are copied. tokens: the calibration's, None without one. memory_bytes: the
    peak, estimated.
    """

    plan: OutputPlan
    side_files: list[str]
    needs: OutputNeeds
    solver: Solver
    tokens: CalibrationTokens | None
    workers: int
    memory_bytes: int
    free_disk_bytes: int


def check_conversion(checkpoint: Checkpoint, recipe: Recipe, options: ConvertOptions, out: Path) -> Preflight:
    """Checks everything that would stop the conversion of `checkpoint` into `out` later.

    Raises RecipeError, SourceError, OutputError, DoesNotFitError. Writes nothing but a temporary file that it removes.
    """
    plan = plan_output(checkpoint, recipe)
    side_files = check_side_files(checkpoint.folder)
    by_text = recipe.options.get("calibrate") in ("builtin", "file") and plan.last_quantized_layer >= 0
    check_source_tokenizer(checkpoint, needed=by_text)
    needs = OutputNeeds.of(checkpoint, plan, side_files, [options.calibration_file])
    probe_output(out, needs, force=options.force)
    free = check_disk(plan, out, options.codec, checkpoint.fetch_bytes)
    solver = choose_solver(recipe.solver)
    workers = choose_workers(plan, solver, options)
    tokens = _calibration(checkpoint, recipe, plan, options)
    if not options.force:
        _check_earlier(out, checkpoint, recipe, options, solver, tokens)
    return Preflight(plan, side_files, needs, solver, tokens, workers, plan.memory_bytes(workers, solver), free)


def _check_earlier(
    out: Path,
    checkpoint: Checkpoint,
    recipe: Recipe,
    options: ConvertOptions,
    solver: Solver,
    tokens: CalibrationTokens | None,
) -> None:
    """OutputError if `out` holds a conversion, complete or not, of something else."""
    if (out / INDEX_NAME).exists():
        check_same(out, checkpoint, recipe, options.codec, tokens)
    # The rules that a target becomes are in the journal, and chosen later.
    elif options.resume and TARGET not in recipe.options:
        check_begun(out, fingerprint(checkpoint, recipe, options.codec, solver, tokens))


def _calibration(
    checkpoint: Checkpoint, recipe: Recipe, plan: OutputPlan, options: ConvertOptions
) -> CalibrationTokens | None:
    """The tokens by which `recipe` calibrates, if it does and something is quantized."""
    kind, tokens = recipe.options.get("calibrate"), recipe.options.get("calibration_tokens")
    if kind is None or not isinstance(tokens, int) or plan.last_quantized_layer < 0:
        return None
    return calibration_tokens(checkpoint, str(kind), tokens, options.calibration_file)
