"""Sizes as people write them."""

import math
import re

from formats.errors import RecipeError

_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}

_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*")


def parse_size(value: int | str, name: str = "size") -> int:
    """Bytes of a number or of a text such as "6GiB", "500 MB", "1.5GB"; a number alone is bytes.

    RecipeError naming `name` for anything else, and for 0.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        n_bytes = value
    else:
        match = _SIZE.fullmatch(value) if isinstance(value, str) else None
        factor = _UNITS.get(match[2].lower() or "b") if match else None
        n_bytes = int(float(match[1]) * factor) if match and factor and "." in match[1] else 0
        if match and factor and "." not in match[1]:
            n_bytes = int(match[1]) * factor
        if not match or not factor:
            raise RecipeError(
                f"{name}: {value!r} is not a size", "write bytes, or a size such as 6GiB or 500MB"
            )
    if n_bytes <= 0:
        raise RecipeError(
            f"{name}: {value!r} is not a size above 0",
            "write bytes, or a size such as 6GiB or 500MB",
        )
    return n_bytes


def format_size(n_bytes: int) -> str:
    """Return a size in decimal units with one digit after the point: 15.3 GB, 33.1 MB, 512 B."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.1f} {unit}"
    return f"{n_bytes} B"


def size_option(n_bytes: int) -> str:
    """Return a size as options take it, rounded up to whole MiB: 5MiB."""
    return f"{math.ceil(n_bytes / 2**20)}MiB"
