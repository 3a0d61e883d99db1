"""The solvers by the names that recipes use."""

import functools
import logging

from converter import solver_native
from converter.solver import Solver

SOLVERS = {
    "hqq": "HQQ without calibration, natively where the library is built, else by the hqq package",
    "hqq-package": "HQQ by the hqq package",
}

_log = logging.getLogger(__name__)


@functools.cache
def _warn_once() -> None:
    _log.warning("%s; the hqq package does the same a hundred times slower", solver_native.describe())


def choose_solver(name: str) -> Solver:
    """The solver that a recipe calls `name` (a key of SOLVERS), as it can run here."""
    if name == "hqq":
        if solver_native.available():
            return solver_native.NativeSolver()
        _warn_once()
    # Here, so that the native solver needs no hqq package, which takes seconds to import.
    from converter.solver_package import PackageSolver

    return PackageSolver()
