"""Identity of a conversion, compared before it resumes or counts as complete."""

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from msgspec.structs import replace

from converter import __version__
from converter.calibration.calibration_pass import VERSION as CALIBRATION_VERSION
from converter.calibration.calibration_text import CalibrationTokens
from converter.checkpoint.adapters.adapter_folder import other_adapters
from converter.checkpoint.source import Checkpoint
from converter.output.conversion_sizes import CHUNK_WEIGHTS
from converter.recipe.conversion_recipe import ConversionRecipe
from converter.recipe.recipe_options import without_rules
from converter.solvers.interface import Solver
from formats.config.recorded_config import changed_fields
from formats.errors import OutputError
from formats.index import Index, read_index
from formats.progress import Progress

_ANOTHER_FOLDER = "choose another --out-dir, or add --force to replace it"


def calibration_version(tokens: CalibrationTokens) -> str:
    """Return the version of a calibration: its code and its tokens."""
    return f"{CALIBRATION_VERSION}, tokens {tokens.sha256}"


def overlay_version(checkpoint: Checkpoint) -> str | None:
    """Return a hash of the shards chosen for duplicate tensors; None without duplicates."""
    if not checkpoint.overlaid:
        return None
    return hashlib.sha256(repr(sorted(checkpoint.overlaid.items())).encode()).hexdigest()


def adapters_version(checkpoint: Checkpoint) -> list[str]:
    """Return the hashes of the merged adapters' files, in order."""
    return [adapter.sha256 for adapter in checkpoint.adapters]


def fingerprint(
    checkpoint: Checkpoint,
    recipe: ConversionRecipe,
    codec: str,
    solver: Solver,
    tokens: CalibrationTokens | None,
) -> dict[str, Any]:
    """Return the fields that must be equal for a resume."""
    calibrated = {"calibration": calibration_version(tokens)} if tokens else {}
    pinned = {"hub": msgspec.to_builtins(checkpoint.hub.pin)} if checkpoint.hub else {}
    overlaid = {"overlay": overlay_version(checkpoint)} if checkpoint.overlaid else {}
    adapted = {}
    if checkpoint.adapters:
        adapted = {"adapter": adapters_version(checkpoint), "peft": version("peft")}
    return {
        **adapted,
        **calibrated,
        **overlaid,
        **pinned,
        "source": {name: checkpoint.shard_sample(name) for name in checkpoint.shards},
        "config": hashlib.sha256(repr(sorted(checkpoint.config.items())).encode()).hexdigest(),
        **recorded_recipe(recipe),
        "codec": codec,
        "code": {
            "moe-convert": __version__,
            "chunk_weights": CHUNK_WEIGHTS,
            "solver": solver.version,
        },
    }


def recorded_recipe(recipe: ConversionRecipe) -> dict[str, Any]:
    """Return the fingerprint's field for the recipe, without the name: it decides no byte."""
    fields = msgspec.to_builtins(recipe.recorded)
    del fields["name"]
    return {"recipe": fields}


def check_same(
    out: Path,
    checkpoint: Checkpoint,
    recipe: ConversionRecipe,
    codec: str,
    tokens: CalibrationTokens | None,
) -> Index:
    """Return the index of the complete conversion in `out`.

    Raises OutputError for another source, recipe, codec or calibration. The recipe may have another
    name. Reads no weights: it compares only names and sizes of the source's shards.
    """
    index = read_index(out)
    old = index.recipe
    new = recipe.recorded
    if recipe.options.rules_are_open:
        # Calibration would choose the recorded rules again.
        old = replace(old, options=without_rules(old.options))
    versions = index.producer.versions
    compared = [
        *(
            (f"recipe ({f})", getattr(old, f), getattr(new, f))
            for f in new.__struct_fields__
            if f != "name"
        ),
        ("codec", index.layers[0].experts[0].codec, codec),
        (
            "calibration",
            versions.get("calibration"),
            calibration_version(tokens) if tokens else None,
        ),
        (
            "choice of shards for duplicate tensors",
            versions.get("overlay"),
            overlay_version(checkpoint),
        ),
        *(
            (f"config.json ({name})", index.config.get(name), checkpoint.config.get(name))
            for name in changed_fields(checkpoint.config, index.config)
        ),
        (
            "source",
            {shard.name: shard.size_bytes for shard in index.source.shards},
            checkpoint.shards,
        ),
    ]
    for field, recorded, now in compared:
        if recorded != now:
            _refuse(out, field, recorded, now)
    if difference := other_adapters(index.source.adapters, checkpoint.adapters):
        raise OutputError(f"{out} holds a complete conversion, {difference[0]}", _ANOTHER_FOLDER)
    return index


def check_contents(
    out: Path, checkpoint: Checkpoint, index: Index, progress: Progress | None
) -> None:
    """Raise OutputError unless the shards of `checkpoint` have the hashes in `index`.

    out: the folder of `index`, for the message.
    """
    done = 0
    total = sum(shard.size_bytes for shard in index.source.shards)
    for shard in index.source.shards:
        if checkpoint.shard_sha256(shard.name) != shard.sha256:
            _refuse(out, "source", f"{shard.name} {shard.sha256}", "other contents")
        done += shard.size_bytes
        if progress:
            progress("comparing the source", done, total)


def _refuse(out: Path, field: str, recorded: Any, now: Any) -> NoReturn:
    raise OutputError(
        f"{out} holds a complete conversion with another {field}:"
        f" recorded {recorded!r}, now {now!r}",
        _ANOTHER_FOLDER,
    )
