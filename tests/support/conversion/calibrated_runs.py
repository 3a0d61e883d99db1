"""Calibrated conversions of small checkpoints."""

from pathlib import Path
from typing import Any

from converter.convert import ConvertOptions, convert_checkpoint
from converter.recipe.recipes import make_recipe


def convert(source: Path, out: Path, recipe: dict[str, Any] | None = None, **options: Any) -> str:
    """Convert to 2 bits, by default calibrated with 1024 random tokens."""
    chosen = {"calibrate": "random", "calibration_tokens": 1024} | (recipe or {})
    return convert_checkpoint(
        source, out, make_recipe("2bit", **chosen), ConvertOptions(**options)
    ).done
