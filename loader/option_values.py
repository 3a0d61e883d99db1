"""Checks option values of loader.from_pretrained that need no folder to be checked."""

from collections.abc import Sequence
from typing import Any

from formats.checksums import CHECKS
from formats.errors import RecipeError
from formats.reading.readers import READERS
from formats.sizes import parse_size
from loader.arithmetic.backend import KERNELS
from loader.cuda.device_choice import device_names
from loader.experts.policy import POLICIES

_NAMES: dict[str, tuple[Any, ...]] = {
    "io": ("auto", *READERS),
    "policy": tuple(POLICIES),
    "cpu_share": ("off", "auto"),
    "check": CHECKS,
    "kernels": KERNELS,
    "kv_bits": (8, 16),
}


def check_options(**options: Any) -> None:
    """Raise RecipeError for the first of `options` with an impossible value."""
    for option, value in options.items():
        if option in _NAMES:
            if value not in _NAMES[option]:
                known = ", ".join(map(str, _NAMES[option]))
                raise RecipeError(f"{option}: {value!r} is unknown; known are {known}")
        elif option in ("gpu_cache", "ram_cache"):
            if value != "auto":
                parse_size(value, option)
        elif option == "slots":
            if not isinstance(value, Sequence) or not all(_is_count(count) for count in value):
                raise RecipeError(
                    f"slots: {value!r} is no list of numbers", "give one number for each layer"
                )
        elif option == "prefetch":
            if value != "auto" and not _is_count(value):
                raise RecipeError(
                    f"prefetch: {value!r} is not a number of experts; expected auto, or 0 or more"
                )
        elif option == "device":
            device_names(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
