"""Control groups that limit a process's memory, page cache included, if this user may make them."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from uuid import uuid4

VERSIONS = (
    # Parent of new groups, the limit's file, the file that takes a process.
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "cgroup.procs"),
    (Path("/sys/fs/cgroup"), "memory.max", "cgroup.procs"),
)


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[Callable[[], None] | None]:
    """Yield the function by which a child process enters a group with this limit.

    None if this user cannot make a group.
    """
    for parent, limit, processes in VERSIONS:
        group = parent / f"moe-{uuid4().hex[:8]}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if _written(group / limit, str(limit_bytes)):
                yield partial(_enter, group / processes)
                return
        finally:
            group.rmdir()
    yield None


def _written(path: Path, text: str) -> bool:
    try:
        path.write_text(text)
    except OSError:
        return False
    return True


def _enter(processes: Path) -> None:
    processes.write_text(str(os.getpid()))
