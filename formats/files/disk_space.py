"""Free space of the disk that a path is on."""

import os
import shutil
from pathlib import Path

from formats.files.io_errors import translated


def free_disk_bytes(path: Path) -> int:
    """Return the free bytes of the disk of `path`, which need not exist yet.

    Raises MoeConvertError if the disk cannot be asked.
    """
    folder = next(p for p in (path, *path.absolute().parents) if os.path.exists(p))
    with translated(folder, "used"):
        return shutil.disk_usage(folder).free
