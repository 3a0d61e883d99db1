"""A recipe whose target of bits becomes rules: measured once, kept beside the work, the same for any workers."""

import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from converter.bit_budget import choose_bits, ladder
from converter.bit_rules import rules_of
from converter.bit_sensitivity import BitSensitivity
from converter.calibration_text import CalibrationTokens
from converter.identity import Progress
from converter.solver import CalibratedSolver
from converter.solvers import choose_solver
from converter.source import Checkpoint
from converter.workers import run_all
from formats.index import Recipe

_log = logging.getLogger(__name__)


def with_chosen_bits(
    checkpoint: Checkpoint,
    recipe: Recipe,
    tokens: CalibrationTokens,
    out: Path,
    max_workers: int,
    progress: Progress | None,
) -> Recipe:
    """`recipe` with the rules that fit its target best, by the errors of the checkpoint's layers for `tokens`.

    What was measured is kept in folder `out` until the conversion is complete. Errors as BitSensitivity, choose_bits.
    """
    a = checkpoint.architecture
    source = {name: checkpoint.shard_sample(name) for name in checkpoint.shards}
    experts = [[("expert", layer, expert) for expert in range(a.num_local_experts)] for layer in range(a.expert_layers)]

    def report(layers: int) -> None:
        if progress:
            progress("choosing bits", layers * checkpoint.n_bytes // a.expert_layers, checkpoint.n_bytes)
        for key in experts[layers - 1] if layers else ():
            checkpoint.done(key)

    checkpoint.expect([key for layer in experts for key in layer], by_layer=True)
    solver = choose_solver(recipe.solver)
    assert isinstance(solver, CalibratedSolver)  # as the recipe was checked
    pool = ThreadPoolExecutor(max_workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        sensitivity = BitSensitivity(checkpoint, solver, ladder(recipe), tokens, out, source, partial(run_all, pool))
        chosen = choose_bits(recipe, a, sensitivity.measure(report))
    except BaseException:
        checkpoint.stop.set()
        raise
    finally:
        pool.shutdown()
    _log.info("bits for %s: %s", recipe.name, ", ".join(rule.text for rule in rules_of(chosen)))
    return chosen
