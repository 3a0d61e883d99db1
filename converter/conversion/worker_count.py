"""How many workers a conversion has, so that it fits the memory."""

import logging
import os

import psutil

from converter.convert_options import ConvertOptions
from converter.output.conversion_sizes import OutputPlan
from converter.solvers.interface import Solver
from formats.errors import DoesNotFitError
from formats.files.control_group import within_group

_SHARE = 0.9
"""Of the available memory, which other processes use too."""
_HINT = "close other programs; fewer --calibration-tokens or --calibrate none take less, --down-width takes more"

_log = logging.getLogger(__name__)


def choose_workers(plan: OutputPlan, solver: Solver, options: ConvertOptions) -> int:
    """The workers asked for, or the processors; fewer where memory would be short.

    DoesNotFitError if one worker takes more than `max_memory_bytes`, or than the machine has; a
    warning if it takes more than is available now. Both name both numbers.
    """
    memory = psutil.virtual_memory()
    available, total = within_group(memory.available, memory.total)
    workers = options.max_workers or _processors()
    limit = options.max_memory_bytes
    if limit is None and options.max_workers is None:
        limit = int(available * _SHARE)
    while limit is not None and workers > 1 and plan.memory_bytes(workers, solver) > limit:
        workers -= 1
    needed = plan.memory_bytes(workers, solver)
    if options.max_memory_bytes is not None and needed > options.max_memory_bytes:
        raise DoesNotFitError(
            f"--max-memory {options.max_memory_bytes}: one worker takes about {needed} bytes",
            "allow that much",
        )
    what = f"the conversion with {workers} workers takes about {needed} bytes of memory"
    if needed > total + psutil.swap_memory().total:
        raise DoesNotFitError(f"{what}, the machine has {total}", _HINT)
    if needed > available:
        _log.warning(
            "%s, available are %d: it may swap, or be stopped by the system", what, available
        )
    return workers


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
