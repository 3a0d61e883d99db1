"""Turns any exception into what a user reads: one message, the next step, an exit code."""

import os
import select
import sys
from dataclasses import dataclass

from formats.errors import DoesNotFitError, MoeConvertError
from formats.files.io_errors import io_error

REPORT_HINT = "report this with the output of `moe-convert env` and of this command with -v"


@dataclass(frozen=True)
class Failure:
    """An exception as a user sees it. expected: False for a bug in moe-convert."""

    message: str
    hint: str
    exit_code: int
    expected: bool = True


def failure_of(error: Exception) -> Failure:
    """Return the message, the next step and the exit code for any exception."""
    if isinstance(error, MoeConvertError):
        return Failure(error.message, error.hint, error.exit_code)
    if isinstance(error, MemoryError) or _is_torch_out_of_memory(error):
        reason = f": {_first_line(error)}" if str(error) else ""
        hint = "close other programs, or lower --ram-cache, --gpu-cache, --max-workers or --batch"
        return Failure(f"out of memory{reason}", hint, DoesNotFitError.exit_code)
    if isinstance(error, OSError) and error.errno is not None:
        return _of_system(error)
    where = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    return Failure(f"unexpected {where}: {error}", REPORT_HINT, 1, expected=False)


def is_closed_pipe(error: Exception) -> bool:
    """True if the reader of stdout or stderr has exited, as in `moe-convert inspect … | head`."""
    return isinstance(error, BrokenPipeError) and any(_has_no_reader(stream) for stream in (1, 2))


def _of_system(error: OSError) -> Failure:
    file = _named(error)
    ours = io_error(error, file, "used")
    return Failure(
        ours.message if file else error.strerror or str(error), ours.hint, ours.exit_code
    )


def _named(error: OSError) -> str:
    """Return the file that `error` names (of two, the target), or an empty string."""
    name = error.filename2 if error.filename2 is not None else error.filename
    return "" if name is None or isinstance(name, int) else os.fsdecode(name)


def _is_torch_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, RuntimeError):
        return False
    # On the CPU torch raises a plain RuntimeError; only its text tells.
    return isinstance(
        error, torch.OutOfMemoryError
    ) or "DefaultCPUAllocator: can't allocate" in str(error)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _has_no_reader(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
