"""The solvers by the names that recipes use."""

import functools
import logging

from converter.solvers import hqq_native, solver_library
from converter.solvers.plain_rows import NoSolver
from converter.solvers.protocol import Solver

NO_SOLVER = "none"
"""Of recipes that quantize nothing."""

SOLVERS = {
    "hqq": "HQQ without calibration, natively where the library is built, else by the hqq package",
    "hqq-package": "HQQ by the hqq package",
    "refit": "range search and least squares, each row's gain corrected; without calibration",
    "feedback": "as refit, and each column's rounding error made up for by the next ones; with calibration",
}

_log = logging.getLogger(__name__)


@functools.cache
def _warn_once() -> None:
    _log.warning(
        "%s; the hqq package does the same a hundred times slower", solver_library.describe()
    )


def choose_solver(name: str) -> Solver:
    """The solver that a recipe calls `name` (a key of SOLVERS, or NO_SOLVER), as it can run here."""
    if name == NO_SOLVER:
        return NoSolver()
    if name in ("refit", "feedback"):
        from converter.solvers import calibrated_solvers

        if solver_library.available():
            return (
                calibrated_solvers.NativeRefit()
                if name == "refit"
                else calibrated_solvers.NativeFeedback()
            )
        _log.warning("%s; the reference in torch is many times slower", solver_library.describe())
        return (
            calibrated_solvers.ReferenceRefit()
            if name == "refit"
            else calibrated_solvers.ReferenceFeedback()
        )
    if name == "hqq":
        if solver_library.available():
            return hqq_native.NativeSolver()
        _warn_once()
    # Here, so that the native solver needs no hqq package, which takes seconds to import.
    from converter.solvers.hqq_package import PackageSolver

    return PackageSolver()
