"""The solvers by their names in recipes: one entry each, with help text and factory.

This module imports neither torch nor a solver, so that the command line starts fast.
"""

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from converter.solvers.interface import Solver

NO_SOLVER = "none"
"""Name of the solver of recipes that quantize nothing."""


@dataclass(frozen=True)
class SolverEntry:
    """One solver.

    help: a few words for the help of --solver. factory: "module:callable" that returns the solver.
    calibrated: True if it needs calibration.
    """

    help: str
    factory: str
    calibrated: bool = False

    def make(self) -> "Solver":
        """Return the solver in its fastest version that runs here."""
        module, _, function = self.factory.partition(":")
        solver: Solver = getattr(importlib.import_module(module), function)()
        return solver


SOLVERS = {
    "feedback": SolverEntry(
        "with calibration",
        "converter.solvers.feedback:make_feedback",
        calibrated=True,
    ),
    "refit": SolverEntry(
        "without calibration",
        "converter.solvers.refit:make_refit",
    ),
    "hqq": SolverEntry(
        "fastest",
        "converter.solvers.hqq:make_hqq",
    ),
    "hqq-package": SolverEntry(
        "slow reference",
        "converter.solvers.hqq_package:PackageHqq",
    ),
}
"""A new solver needs its own file and one entry here."""


def choose_solver(name: str) -> "Solver":
    """Return the solver called `name`: a key of SOLVERS, or NO_SOLVER."""
    if name == NO_SOLVER:
        from converter.solvers.plain_rows import NoSolver

        return NoSolver()
    return SOLVERS[name].make()
