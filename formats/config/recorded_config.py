"""config.json of a converted folder, compared with the fields that the index recorded."""

from pathlib import Path
from typing import Any

from formats import INDEX_NAME
from formats.config.config_gate import RUN_TIME, gate_config
from formats.config.field_rules import short
from formats.config.strict_json import parse
from formats.errors import DamageError, FormatError
from formats.files.paths import read_small
from formats.index import Index, check_version
from formats.repair_hints import repair_command

CONFIG_NAME = "config.json"
METHOD = "moe_convert"
"""The quant_method under which the loader registers its plugin with transformers."""


def read_recorded_config(folder: Path, index: Index) -> tuple[dict[str, Any], list[str]]:
    """Read and gate config.json of `folder`. Returns its fields and notes on changed fields.

    The fields include quantization_config. Fields of RUN_TIME may differ from the index; a
    DamageError names any other field that differs, with both values. Raises FormatError for an
    invalid file.
    """
    where = str(folder / CONFIG_NAME)
    raw = parse(read_small(folder, CONFIG_NAME, str(folder)), where)
    if not isinstance(raw, dict):
        raise FormatError(f"{where}: not an object")
    quantization = raw.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        raise FormatError(f"{where}: field quantization_config.quant_method is not {METHOD!r}")
    check_version(quantization.get("format_version"), f"{where}: quantization_config")
    config, notes = gate_config(raw, where, error=FormatError, converted=True)
    if extra := sorted(quantization.keys() - {"quant_method", "format_version", "recipe"}):
        raise FormatError(
            f"{where}: field {short(f'quantization_config.{extra[0]}')} is"
            f" {short(quantization[extra[0]])}: the converter writes no such field",
            f"remove {short(extra[0])} from quantization_config in config.json",
        )
    recipe = quantization.get("recipe", index.recipe.name)
    if recipe != index.recipe.name:
        raise FormatError(
            f"{where}: quantization_config.recipe is {short(recipe)},"
            f" {folder / INDEX_NAME} says {index.recipe.name!r}"
        )
    for name in changed_fields(config, index.config):
        current = short(config.get(name))
        recorded = short(index.config.get(name))
        if name not in RUN_TIME:
            raise DamageError(
                f"{where}: {name} is {current}, {folder / INDEX_NAME} says {recorded}:"
                " this field is fixed by the weights",
                repair_command(folder, index),
            )
        notes.append(f"{name} is {current}, {recorded} when it was converted")
    return {**config, "quantization_config": quantization}, notes


def changed_fields(config: dict[str, Any], recorded: dict[str, Any]) -> list[str]:
    """Return the names of fields that differ between two gated configs.

    Fields fixed by the weights come before those of RUN_TIME.
    """
    names = sorted(config.keys() | recorded.keys())
    return sorted((n for n in names if config.get(n) != recorded.get(n)), key=RUN_TIME.__contains__)
