"""Everything in the output that holds no weights: config.json, copied files, quality.json."""

import hashlib
import json
from pathlib import Path
from typing import Any

from converter.solver import SquaredError
from converter.source import Checkpoint
from converter.source_files import COPIED
from converter.workers import PROJECTIONS
from formats import FORMAT_VERSION
from formats.errors import SourceError
from formats.index import CopiedFile, Recipe
from formats.io_errors import translated
from formats.paths import locate
from formats.writer import write_file


def write_config(checkpoint: Checkpoint, recipe: Recipe, out: Path) -> CopiedFile:
    """The source's config.json with the quantization_config by which transformers finds the loader's plugin."""
    quantization = {
        "quant_method": "moe_convert",
        "format_version": FORMAT_VERSION,
        "recipe": recipe.name,
    }
    config = {**checkpoint.config, "quantization_config": quantization}
    return _write(out, "config.json", json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n")


def copy_files(source: Path, out: Path) -> list[CopiedFile]:
    """Copies tokenizer, generation config, chat template and licence byte for byte."""
    return [_write(out, name, _read(source, name)) for name in copied_names(source)]


def copied_names(source: Path) -> list[str]:
    """The files that `copy_files` copies, relative to the source."""
    return sorted({p.name for pattern in COPIED for p in source.glob(pattern) if not p.is_dir()})


def quality_of(records: list[dict[str, Any]]) -> dict[str, Any]:
    """quality.json: relative weight errors ‖quantized − weight‖ / ‖weight‖ by expert and projection, and in total."""
    experts: dict[tuple[int, int], dict[str, SquaredError]] = {}
    linears: dict[str, SquaredError] = {}
    for record in records:
        if record["unit"] == "expert":
            errors = {p: SquaredError(*record["errors"][p]) for p in PROJECTIONS}
            experts[record["layer"], record["expert"]] = errors
        elif record["unit"] == "linear":
            linears[record["module"]] = SquaredError(*record["errors"])

    calibrated: dict[str, Any] = {}
    tokens = {(r["layer"], r["expert"]): r["calibration_tokens"] for r in records if "calibration_tokens" in r}
    if tokens:
        lacking = [r for r in records if r.get("uncalibrated")]
        calibrated["uncalibrated"] = sorted(
            r["module"]
            if r["unit"] == "linear"
            else f"layer {r['layer']} expert {r['expert']} {', '.join(r['uncalibrated'])}"
            for r in lacking
        )

    def total(errors: Any) -> float:
        return sum(errors, SquaredError()).relative

    ordered = sorted(experts.items())
    return {
        "measure": "relative weight error, norm(quantized - weight) / norm(weight)",
        "totals": {
            **{p: total(errors[p] for _, errors in ordered) for p in PROJECTIONS},
            "experts": total(e for _, errors in ordered for e in errors.values()),
            "attention": total(linears[module] for module in sorted(linears) if module != "lm_head"),
        },
        "experts": [
            {"layer": layer, "expert": expert, **{p: errors[p].relative for p in PROJECTIONS}}
            | ({"calibration_tokens": tokens[layer, expert]} if (layer, expert) in tokens else {})
            for (layer, expert), errors in ordered
        ],
        "trunk": {module: linears[module].relative for module in sorted(linears)},
        **calibrated,
    }


def write_quality(records: list[dict[str, Any]], out: Path) -> dict[str, Any]:
    """Writes quality.json and returns its value."""
    quality = quality_of(records)
    write_file(out / "quality.json", json.dumps(quality, indent=1).encode() + b"\n")
    return quality


def _read(source: Path, name: str) -> bytes:
    with translated(source / name, "read", SourceError):
        return locate(source, name, str(source)).read_bytes()


def _write(out: Path, name: str, data: bytes) -> CopiedFile:
    write_file(out / name, data)
    return CopiedFile(name, len(data), hashlib.sha256(data).hexdigest())
