"""Writes quality.json: the errors of the quantized weights, from a conversion's records."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from converter.checkpoint.model_shape import HEAD
from converter.checkpoint.names import EXPERT_MATRICES
from converter.journal.records import ExpertRecord, LinearRecord, Record
from converter.squared_error import SquaredError
from formats.files.partial_file import write_file
from formats.quality import QUALITY_NAME


def write_quality(records: Iterable[Record], out: Path) -> dict[str, Any]:
    """Write quality.json; return its value."""
    quality = _quality(list(records))
    write_file(out / QUALITY_NAME, json.dumps(quality, indent=1).encode() + b"\n")
    return quality


def _quality(records: list[Record]) -> dict[str, Any]:
    """Return relative weight errors, ‖quantized - weight‖ / ‖weight‖: per projection and total."""
    experts = [record for record in records if isinstance(record, ExpertRecord)]
    experts.sort(key=lambda record: (record.layer, record.expert))
    linears = [record for record in records if isinstance(record, LinearRecord)]
    linears.sort(key=lambda record: record.module)
    errors = {p: [getattr(record.errors, p) for record in experts] for p in EXPERT_MATRICES}
    # Sums go expert by expert: another order would change the last bits.
    all_errors = [error for parts in zip(*errors.values(), strict=True) for error in parts]
    return {
        "measure": "relative weight error, norm(quantized - weight) / norm(weight)",
        "totals": {
            **{projection: _total(parts) for projection, parts in errors.items()},
            "experts": _total(all_errors),
            "attention": _total(record.errors for record in linears if record.module != HEAD),
        },
        "experts": [_expert_fields(record) for record in experts],
        "trunk": {record.module: record.errors.relative for record in linears},
        **_uncalibrated(experts, linears),
    }


def _total(errors: Iterable[SquaredError]) -> float:
    return sum(errors, SquaredError()).relative


def _expert_fields(record: ExpertRecord) -> dict[str, Any]:
    fields: dict[str, Any] = {"layer": record.layer, "expert": record.expert}
    fields |= {p: getattr(record.errors, p).relative for p in EXPERT_MATRICES}
    if record.calibration_tokens is not None:
        fields["calibration_tokens"] = record.calibration_tokens
    return fields


def _uncalibrated(experts: list[ExpertRecord], linears: list[LinearRecord]) -> dict[str, list[str]]:
    """Return the names that a calibrated conversion quantized without calibration.

    Empty for a conversion without calibration.
    """
    if all(record.calibration_tokens is None for record in experts):
        return {}
    names = [r.module for r in linears if r.uncalibrated]
    names += [
        f"layer {r.layer} expert {r.expert} {', '.join(r.uncalibrated)}"
        for r in experts
        if r.uncalibrated
    ]
    return {"uncalibrated": sorted(names)}
