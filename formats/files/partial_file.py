"""New files that appear complete: written under a `.partial` name, synced, then renamed."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from formats.files.output_file import OutputFile


def partial_path(path: Path) -> Path:
    """Return the name that the file `path` has until it is complete."""
    return path.with_name(path.name + ".partial")


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[OutputFile]:
    """Yield an empty partial file, which durably replaces `path` when the block ends.

    An error in the block removes the partial file and leaves `path` unchanged. Raises the errors
    of OutputFile.
    """
    partial = partial_path(path)
    with OutputFile(partial) as file:
        try:
            yield file
            file.finish(path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def write_file(path: Path, data: bytes) -> None:
    """Durably replace the file `path` by `data`. Raises the errors of OutputFile."""
    with new_file(path) as file:
        file.write_at(data, 0)
