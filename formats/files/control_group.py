"""Memory limit of the control group (a container's) in which this process runs."""

from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_FILES = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
"""Names of limit and use in versions 2 and 1 of control groups."""


def within_group(available: int, total: int) -> tuple[int, int]:
    """Return (available, total) memory in bytes, reduced to the control group's limit."""
    for limit_name, used_name in _FILES:
        limit = _number(_ROOT / limit_name)
        used = _number(_ROOT / used_name)
        # Without a limit, version 1 reports nearly 2^63. The page cache counts as used, although
        # the kernel would free it: the result is a lower bound.
        if limit is not None and used is not None and limit < total:
            available = min(available, max(0, limit - used))
            total = limit
    return available, total


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
