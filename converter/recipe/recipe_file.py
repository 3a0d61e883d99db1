"""A recipe as a JSON file: the options of `convert` under their names, bit rules as a list."""

from typing import Any

from msgspec import Struct
from msgspec.structs import asdict

from converter.recipe.recipes import DEFAULT_RECIPE
from formats.config.strict_json import parse, typed
from formats.errors import RecipeError

_MAX_BYTES = 1 << 20


class RecipeFile(Struct, frozen=True, forbid_unknown_fields=True):
    """The arguments of `make_recipe`; the recipe `name` gives the missing ones."""

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
    """Return the arguments of `make_recipe` for a recipe's name or a file that ends with .json.

    Raises RecipeError with file and field.
    """
    if not name.endswith(".json"):
        return {"name": name}
    try:
        with open(name, "rb") as f:
            data = f.read(_MAX_BYTES + 1)
    except OSError as e:
        raise RecipeError(f"recipe {name}: {e.strerror}") from None
    value = parse(data, name, max_bytes=_MAX_BYTES, error=RecipeError)
    settings = asdict(typed(value, RecipeFile, name, error=RecipeError))
    if settings["calibrate"] == "file":
        raise RecipeError(
            f"{name}: calibrate is 'file', but a recipe file cannot name the text",
            "remove calibrate from it and add --calibrate TEXT.txt",
        )
    return {field: setting for field, setting in settings.items() if setting is not None}
