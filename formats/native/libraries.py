"""Finds and loads the native library of a room."""

import ctypes
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Signatures = Mapping[str, tuple[Any, list[Any]]]
"""Functions: the type of the result, those of the arguments."""


def load_library(
    room: str, name: str, version: tuple[str, int], signatures: Signatures
) -> tuple[ctypes.CDLL | None, str]:
    """Library `name` of package `room` and its path, or None and one sentence on why it is not
    there.

    version: the function that returns the library's ABI version, and the version that is needed.
    """
    paths = _paths(room, name)
    reason = f"{name} is not built (looked for {', '.join(map(str, paths))})"
    function, needed = version
    for path in paths:
        if not path.is_file():
            continue
        try:
            library = ctypes.CDLL(str(path))
            found = getattr(library, function)()
            if found == needed:
                _declare(library, signatures)
                return library, str(path)
            reason = f"{path} has ABI version {found}, this package needs {needed}"
        except (OSError, AttributeError) as error:
            reason = f"{path} cannot be loaded: {error}"
    return None, reason


def _paths(room: str, name: str) -> list[Path]:
    """Where the library may lie, best first: beside its modules, and in platlib.

    An editable install leaves built libraries in platlib, away from the modules.
    """
    folders = Path(__file__).parents[2] / room, Path(sysconfig.get_path("platlib")) / room
    return list(dict.fromkeys(folder / name for folder in folders))


def _declare(library: ctypes.CDLL, signatures: Signatures) -> None:
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
