"""The memory limit of the control group (a container's) that this process runs in."""

from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


def within_group(available: int, total: int) -> tuple[int, int]:
    """(available, total) bytes of the machine, lowered to the control group's where it allows less."""
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit, used = _number(_ROOT / limit_name), _number(_ROOT / used_name)
        # Without a limit, version 1 reports nearly 2^63. Page cache counts as used: too careful,
        # never too bold.
        if limit is not None and used is not None and limit < total:
            available, total = min(available, max(0, limit - used)), limit
    return available, total


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
