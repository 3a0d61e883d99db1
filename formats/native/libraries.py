"""Finds and loads the native library of a package."""

import ctypes
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Signatures = Mapping[str, tuple[Any, list[Any]]]
"""Function name -> (result type, argument types)."""


def load_library(
    room: str, name: str, version: tuple[str, int], signatures: Signatures
) -> tuple[ctypes.CDLL | None, str]:
    """Load library `name` of package folder `room`.

    Returns (library, its path), or (None, one sentence with the reason). `version` is the function
    that returns the library's ABI version, and the required version.
    """
    paths = _paths(room, name)
    reason = f"{name} is not built (looked for {', '.join(map(str, paths))})"
    function, needed = version
    for path in paths:
        if not path.is_file():
            continue
        try:
            library = ctypes.CDLL(str(path))
            actual = getattr(library, function)()
            if actual == needed:
                _declare(library, signatures)
                return library, str(path)
            reason = f"{path} has ABI version {actual}, this package needs {needed}"
        except (OSError, AttributeError) as error:
            reason = f"{path} cannot be loaded: {error}"
    return None, reason


def _paths(room: str, name: str) -> list[Path]:
    """List the candidate paths, best first: beside the modules, then in platlib.

    An editable install puts built libraries into platlib.
    """
    beside_modules = Path(__file__).parents[2] / room / name
    in_platlib = Path(sysconfig.get_path("platlib")) / room / name
    return list(dict.fromkeys((beside_modules, in_platlib)))


def _declare(library: ctypes.CDLL, signatures: Signatures) -> None:
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
