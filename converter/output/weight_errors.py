"""quality.json: how far the quantized weights are from the source's, from the records of a
conversion.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from converter.checkpoint.names import EXPERT_MATRICES
from converter.journal.records import ExpertRecord, LinearRecord, Record
from converter.squared_error import SquaredError
from formats.quality import QUALITY_NAME
from formats.writer import write_file


def write_quality(records: Iterable[Record], out: Path) -> dict[str, Any]:
    """Writes quality.json and returns its value."""
    quality = quality_of(list(records))
    write_file(out / QUALITY_NAME, json.dumps(quality, indent=1).encode() + b"\n")
    return quality


def quality_of(records: list[Record]) -> dict[str, Any]:
    """quality.json: relative weight errors ‖quantized − weight‖ / ‖weight‖ by expert and
    projection, and in total.
    """
    experts = sorted(
        (r for r in records if isinstance(r, ExpertRecord)), key=lambda r: (r.layer, r.expert)
    )
    linears = sorted((r for r in records if isinstance(r, LinearRecord)), key=lambda r: r.module)
    errors = {p: [getattr(r.errors, p) for r in experts] for p in EXPERT_MATRICES}

    def total(parts: Iterable[SquaredError]) -> float:
        return sum(parts, SquaredError()).relative

    return {
        "measure": "relative weight error, norm(quantized - weight) / norm(weight)",
        "totals": {
            **{p: total(parts) for p, parts in errors.items()},
            "experts": total(
                error for parts in zip(*errors.values(), strict=True) for error in parts
            ),
            "attention": total(r.errors for r in linears if r.module != "lm_head"),
        },
        "experts": [_of_expert(record) for record in experts],
        "trunk": {record.module: record.errors.relative for record in linears},
        **_uncalibrated(experts, linears),
    }


def _of_expert(record: ExpertRecord) -> dict[str, Any]:
    errors = {p: getattr(record.errors, p).relative for p in EXPERT_MATRICES}
    tokens = record.calibration_tokens
    found = {} if tokens is None else {"calibration_tokens": tokens}
    return {"layer": record.layer, "expert": record.expert, **errors, **found}


def _uncalibrated(experts: list[ExpertRecord], linears: list[LinearRecord]) -> dict[str, list[str]]:
    """What a calibrated conversion quantized without calibration; nothing of another conversion."""
    if all(record.calibration_tokens is None for record in experts):
        return {}
    names = [r.module for r in linears if r.uncalibrated]
    names += [
        f"layer {r.layer} expert {r.expert} {', '.join(r.uncalibrated)}"
        for r in experts
        if r.uncalibrated
    ]
    return {"uncalibrated": sorted(names)}
