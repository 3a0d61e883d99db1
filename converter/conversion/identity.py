"""What a conversion is a conversion of: compared before one is resumed or called complete."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from msgspec.structs import replace

from converter import __version__
from converter.calibration.calibration_pass import VERSION as CALIBRATION_VERSION
from converter.calibration.calibration_text import CalibrationTokens
from converter.checkpoint.source import Checkpoint
from converter.output.conversion_sizes import CHUNK_WEIGHTS
from converter.recipe.conversion_recipe import ConversionRecipe
from converter.recipe.recipe_options import without_rules
from converter.solvers.interface import Solver
from formats.config.recorded_config import changed_fields
from formats.errors import OutputError
from formats.index import Index, read_index

Progress = Callable[[str, int, int], None]
"""Called with (stage, done bytes, total bytes); bytes are the source's."""


def calibration_version(tokens: CalibrationTokens) -> str:
    """What the bytes of a calibrated conversion depend on besides the recipe."""
    return f"{CALIBRATION_VERSION}, tokens {tokens.sha256}"


def overlay_version(checkpoint: Checkpoint) -> str | None:
    """What the bytes depend on besides the shards, where some tensors are in several of them."""
    if not checkpoint.overlaid:
        return None
    return hashlib.sha256(repr(sorted(checkpoint.overlaid.items())).encode()).hexdigest()


def fingerprint(
    checkpoint: Checkpoint,
    recipe: ConversionRecipe,
    codec: str,
    solver: Solver,
    tokens: CalibrationTokens | None,
) -> dict[str, Any]:
    """What must be the same for a resume."""
    calibrated = {"calibration": calibration_version(tokens)} if tokens else {}
    pinned = {"hub": msgspec.to_builtins(checkpoint.hub.pin)} if checkpoint.hub else {}
    overlaid = {"overlay": overlay_version(checkpoint)} if checkpoint.overlaid else {}
    return {
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
    """The field of a fingerprint that says the recipe."""
    return {"recipe": msgspec.to_builtins(recipe.recorded)}


def check_same(
    out: Path,
    checkpoint: Checkpoint,
    recipe: ConversionRecipe,
    codec: str,
    tokens: CalibrationTokens | None,
) -> Index:
    """The index of the complete conversion in `out`; OutputError if it is of another source, recipe
    or calibration.

    Reads no weights: of the source's shards it compares names and sizes.
    """
    index = read_index(out)
    found, asked = index.recipe, recipe.recorded
    if recipe.options.rules_are_open:
        # Its rules were chosen for it; the same would be chosen again.
        found = replace(found, options=without_rules(found.options))
    for field in asked.__struct_fields__:
        if getattr(found, field) != getattr(asked, field):
            _refuse(out, f"recipe ({field})", getattr(found, field), getattr(asked, field))
    if index.layers[0].experts[0].codec != codec:
        _refuse(out, "codec", index.layers[0].experts[0].codec, codec)
    there, now = (
        index.producer.versions.get("calibration"),
        calibration_version(tokens) if tokens else None,
    )
    if there != now:
        _refuse(out, "calibration", there, now)
    if (there := index.producer.versions.get("overlay")) != (now := overlay_version(checkpoint)):
        _refuse(out, "choice of tensors that are in several shards", there, now)
    for name in changed_fields(checkpoint.config, index.config):
        _refuse(out, f"config.json ({name})", index.config.get(name), checkpoint.config.get(name))
    sizes = {shard.name: shard.size_bytes for shard in index.source.shards}
    if sizes != checkpoint.shards:
        _refuse(out, "source", sizes, checkpoint.shards)
    return index


def check_contents(
    out: Path, checkpoint: Checkpoint, index: Index, progress: Progress | None
) -> None:
    """OutputError unless the shards of `checkpoint` have the hashes that `index`, of folder `out`,
    has.
    """
    done, total = 0, sum(shard.size_bytes for shard in index.source.shards)
    for shard in index.source.shards:
        if checkpoint.shard_sha256(shard.name) != shard.sha256:
            _refuse(out, "source", f"{shard.name} {shard.sha256}", "other contents")
        done += shard.size_bytes
        if progress:
            progress("comparing the source", done, total)


def _refuse(out: Path, what: str, there: Any, now: Any) -> NoReturn:
    raise OutputError(
        f"{out} holds a complete conversion with another {what}: {there!r} there, {now!r} now",
        "choose another --out-dir, or add --force to replace it",
    )
