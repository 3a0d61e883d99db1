"""Turns a recipe's target of bits into bit rules, from errors that calibration measures."""

import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from converter.calibration.bit_sensitivity import BitSensitivity
from converter.calibration.calibration_text import CalibrationTokens
from converter.conversion.plan import ConversionPlan
from converter.conversion.units import expert_units, shard_needs
from converter.conversion.worker import run_all
from converter.recipe.bit_budget import choose_bits, ladder
from converter.solvers.interface import CalibratedSolver
from formats.progress import Progress

_log = logging.getLogger(__name__)


def with_chosen_bits(
    plan: ConversionPlan, solver: CalibratedSolver, tokens: CalibrationTokens, progress: Progress
) -> ConversionPlan:
    """Return the plan with the bit rules that reduce the measured errors most within its target.

    The measured errors stay in the output folder until the conversion is complete, for a resume.
    The number of workers does not change them. Raises what BitSensitivity and choose_bits raise.
    """
    checkpoint = plan.checkpoint
    recipe = plan.recipe
    layers = [list(expert_units(checkpoint, layer)) for layer in range(len(plan.output.layouts))]

    def report(done: int) -> None:
        progress("choosing bits", done * checkpoint.n_bytes // len(layers), checkpoint.n_bytes)
        for unit in layers[done - 1] if done else ():
            checkpoint.done(unit.key)

    checkpoint.expect(shard_needs([unit for layer in layers for unit in layer], by_layer=True))
    pool = ThreadPoolExecutor(plan.workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        sensitivity = BitSensitivity(
            checkpoint,
            solver,
            ladder(recipe),
            tokens,
            plan.out,
            plan.fingerprint["source"],
            partial(run_all, pool),
        )
        chosen = choose_bits(recipe, checkpoint.architecture, sensitivity.measure(report))
    except BaseException:
        checkpoint.stop.set()
        raise
    finally:
        pool.shutdown()
    _log.info(
        "bit rules for %s: %s", recipe.name, ", ".join(rule.text for rule in chosen.options.rules)
    )
    return plan.with_recipe(chosen)
