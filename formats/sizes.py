"""Sizes as people write them."""

import re

from formats.errors import RecipeError

_UNITS = {"": 1, "b": 1}
for _i, _letter in enumerate("kmgt", 1):
    _UNITS |= {_letter: 1024**_i, f"{_letter}ib": 1024**_i, f"{_letter}b": 1000**_i}


def parse_size(text: str | int, where: str) -> int:
    """Bytes of "10GiB", "500MB", "6g" (binary) or a plain number; RecipeError naming `where` for anything else."""
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower())
    if not match or match[2] not in _UNITS:
        raise RecipeError(f"{where}: {text!r} is not a size; write bytes, or a number with MB, MiB, GB or GiB")
    return int(float(match[1]) * _UNITS[match[2]])
