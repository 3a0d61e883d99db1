"""A recipe as a JSON file: what the options of `convert` say, under their names, with rules of bits
as a list.
"""

from typing import Any

from msgspec import Struct
from msgspec.structs import asdict

from converter.recipe.recipes import DEFAULT_RECIPE
from formats.config.strict_json import parse, typed
from formats.errors import RecipeError

_MOST_BYTES = 1 << 20


class RecipeFile(Struct, frozen=True, forbid_unknown_fields=True):
    """The arguments of `make_recipe`; what is not named is the named recipe's."""

    name: str = DEFAULT_RECIPE
    bits: int | None = None
    attn_bits: int | None = None
    head_bits: int | None = None
    group_size: int | None = None
    gate_up: str | None = None
    down: str | None = None
    solver: str | None = None
    calibrate: str | None = None
    calibration_tokens: int | None = None
    rules: list[str] = []
    target_bpw: float | None = None
    down_width: int | str | None = None


def recipe_settings(name: str) -> dict[str, Any]:
    """The arguments of `make_recipe` for a recipe's name, or for the file called `name` if that
    ends with .json.

    RecipeError naming file and field.
    """
    if not name.endswith(".json"):
        return {"name": name}
    try:
        with open(name, "rb") as f:
            data = f.read(_MOST_BYTES + 1)
    except OSError as e:
        raise RecipeError(f"recipe {name}: {e.strerror}") from None
    value = parse(data, name, max_bytes=_MOST_BYTES, error=RecipeError)
    settings = asdict(typed(value, RecipeFile, name, error=RecipeError))
    if settings["calibrate"] == "file":
        raise RecipeError(
            f"{name}: calibrate is 'file', and a recipe names no text",
            "give it with --calibrate FILE",
        )
    return {field: setting for field, setting in settings.items() if setting is not None}
