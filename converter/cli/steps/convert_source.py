"""Turns the options of `convert` into a recipe, its settings and an opened source."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from converter.checkpoint.adapters.adapter_folder import AdapterFolder
    from converter.convert_options import ConvertOptions
    from converter.recipe.conversion_recipe import ConversionRecipe

_RECIPE_ARGUMENTS = (
    "bits",
    "attn_bits",
    "head_bits",
    "group_size",
    "gate_up",
    "down",
    "solver",
    "calibration_tokens",
    "target_bpw",
)
"""Options that are arguments of `make_recipe` under the same name."""


def recipe_of(options: dict[str, Any]) -> "ConversionRecipe":
    """Return the recipe that the options describe. RecipeError as in `make_recipe`."""
    from converter.recipe.recipe_file import recipe_settings
    from converter.recipe.recipes import make_recipe

    calibrate, _ = _calibration(options["calibrate"])
    settings = recipe_settings(options["recipe_name"])
    settings |= {name: options[name] for name in _RECIPE_ARGUMENTS if options[name] is not None}
    if calibrate:
        settings["calibrate"] = calibrate
    if width := options["down_width"]:
        settings["down_width"] = int(width) if width.isdecimal() else width
    settings["rules"] = [*settings.get("rules", []), *options["layer_bits"]]
    return make_recipe(**settings)


def convert_options_of(options: dict[str, Any]) -> "ConvertOptions":
    """Return the settings of the conversion itself."""
    from converter.convert_options import ConvertOptions

    _, calibration_file = _calibration(options["calibrate"])
    return ConvertOptions(
        max_workers=options["max_workers"],
        codec=options["codec"],
        resume=not options["no_resume"],
        force=options["force"],
        calibration_file=calibration_file,
        part=_part(options["part"]),
        max_memory_bytes=_size(options["max_memory"], "--max-memory"),
    )


def open_source(
    model: Path, out: Path | None, recipe: str, options: dict[str, Any]
) -> tuple[Any, Path]:
    """Return the source (a folder's path or a HubModel) and the output folder.

    A folder takes precedence over a repository of the same name.
    """
    from converter.checkpoint.shards.hub_model import HubModel
    from formats.repo_names import is_repo_name

    name = str(model)
    hub_options = ["revision", "max_disk", "no_keep"]
    recipe = "-".join((*map(_short_name, options["adapters"]), recipe))
    if not (options["upload_repo"] or options["adapters"]):
        hub_options.append("token")
    given = [f"--{option.replace('_', '-')}" for option in hub_options if options[option]]
    if model.exists() or not is_repo_name(name):
        if given:
            raise click.UsageError(
                f"{', '.join(given)}: only for a repository on the Hub, and {name} is a folder's"
                " name"
            )
        return model, out or model.resolve().with_name(f"{model.resolve().name}-{recipe}")
    out = out or Path(f"{model.name}-{recipe}")
    source = HubModel.open(
        name,
        options["revision"],
        options["token"],
        keep=not options["no_keep"],
        max_disk_bytes=_size(options["max_disk"], "--max-disk"),
        resume=None if options["no_resume"] or options["force"] else out,
    )
    return source, out


def open_adapters(names: Sequence[str], token: str | None) -> "list[AdapterFolder]":
    """Open adapters by their folders or repositories. Raises the errors of AdapterFolder.open."""
    from converter.checkpoint.adapters.adapter_folder import AdapterFolder

    return [AdapterFolder.open(name, token) for name in names]


def check_upload(source: Any, options: dict[str, Any]) -> None:
    """Reject before the conversion what the upload would reject after it."""
    from converter.publish.folder_card import check_license
    from converter.publish.hub_commit import PublishOptions, check_target
    from formats.repo_names import check_repo_name

    repo = options["upload_repo"]
    if not repo:
        if options["private"] or options["license_id"]:
            raise click.UsageError("--private and --license need --upload-repo")
        return
    if options["part"]:
        raise click.UsageError("--upload-repo: a part of the layers cannot be published")
    check_repo_name(repo)
    folder = source if isinstance(source, Path) else source.folder
    if folder.is_dir():
        check_license(folder, options["license_id"])
    check_target(
        PublishOptions(
            repo, options["private"], license=options["license_id"], token=options["token"]
        )
    )


def _short_name(adapter: str) -> str:
    """Return the last part of an adapter's name, without a revision."""
    folder = Path(adapter)
    return folder.resolve().name if folder.exists() else Path(adapter.partition("@")[0]).name


def _calibration(value: str | None) -> tuple[str | None, Path | None]:
    """Return (kind, file) of --calibrate. Any value that is not a kind is a file."""
    from converter.calibration.calibration_text import KINDS

    if value is None or (value in KINDS and value != "file"):
        return value, None
    return "file", Path(value)


def _size(text: str | None, option: str) -> int | None:
    from formats.sizes import parse_size

    return parse_size(text, option) if text else None


def _part(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal()):
        raise click.BadParameter(f"{text!r} is not I/N, such as 1/4", param_hint="--layers")
    return int(part), int(parts)
