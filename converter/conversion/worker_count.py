"""Chooses the number of workers so that the conversion fits in memory."""

import logging
import os

import psutil

from converter.convert_options import ConvertOptions
from converter.output.conversion_sizes import OutputPlan
from converter.solvers.interface import Solver
from formats.errors import DoesNotFitError
from formats.files.control_group import within_group

_AVAILABLE_SHARE = 0.9
"""Share of the available memory to use; other processes may take the remainder."""
_HINT = (
    "close other programs; fewer --calibration-tokens, a smaller --down-width or --calibrate none"
    " need less"
)

_log = logging.getLogger(__name__)


def choose_workers(plan: OutputPlan, solver: Solver, options: ConvertOptions) -> int:
    """Return the requested number of workers, or of processors; fewer if memory is short.

    Raises DoesNotFitError if one worker needs more than `max_memory_bytes` or the machine's memory.
    Logs a warning if the conversion needs more than is available now.
    """
    memory = psutil.virtual_memory()
    available, total = within_group(memory.available, memory.total)
    workers = options.max_workers or _processors()
    limit = options.max_memory_bytes
    if limit is None and options.max_workers is None:
        limit = int(available * _AVAILABLE_SHARE)
    while limit is not None and workers > 1 and plan.memory_bytes(workers, solver) > limit:
        workers -= 1
    needed = plan.memory_bytes(workers, solver)
    if options.max_memory_bytes is not None and needed > options.max_memory_bytes:
        raise DoesNotFitError(
            f"--max-memory {options.max_memory_bytes}: one worker needs about {needed} bytes",
            f"use --max-memory {needed}",
        )
    need = f"the conversion with {workers} workers needs about {needed} bytes of memory"
    if needed > total + psutil.swap_memory().total:
        raise DoesNotFitError(f"{need}, the machine has {total}", _HINT)
    if needed > available:
        _log.warning(
            "%s, %d are available: it may swap, or the system may kill it", need, available
        )
    return workers


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
