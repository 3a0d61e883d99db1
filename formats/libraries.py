"""Where the native libraries of a room may lie."""

import sysconfig
from pathlib import Path


def library_paths(room: str, name: str) -> list[Path]:
    """The places of library `name` of package `room`, best first: beside its modules, and in platlib.

    An editable install leaves built libraries in platlib, away from the modules.
    """
    folders = Path(__file__).parent.parent / room, Path(sysconfig.get_path("platlib")) / room
    return list(dict.fromkeys(folder / name for folder in folders))
