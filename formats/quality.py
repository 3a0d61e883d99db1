"""quality.json: the results of a conversion and of an evaluation (docs/quality.md)."""

from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct, to_builtins

from formats.config.strict_json import dump, parse, typed
from formats.errors import DamageError
from formats.files.io_errors import translated
from formats.files.partial_file import write_file
from formats.files.paths import read_small
from formats.index import Label, Natural, Positive, Sha256

QUALITY_NAME = "quality.json"

Share = Annotated[float, Meta(ge=0, le=1)]
AtLeastZero = Annotated[float, Meta(ge=0)]


class Comparison(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Distance of the model's predictions from the original's, on one text or on all texts.

    `…_error` is a standard error over windows; None if there is only one window.
    """

    name: Label
    windows: Positive
    tokens: Positive
    perplexity: AtLeastZero
    original_perplexity: AtLeastZero
    ratio: AtLeastZero
    """perplexity / original_perplexity"""
    ratio_error: AtLeastZero | None
    """Standard error of the ratio's logarithm."""
    kl: float
    """Mean over tokens of KL(original || model), in nats."""
    kl_error: AtLeastZero | None
    agreement: Share
    """Share of tokens for which both models predict the same most likely token."""
    routers: list[Share]
    """For each layer, the share of tokens for which both models choose the same experts."""
    sha256: Sha256 | None = None
    """sha256 of the text's bytes; None for all texts."""


class Evaluation(Struct, frozen=True, forbid_unknown_fields=True):
    """A comparison with the original model."""

    original: Label
    """Name of the original's folder."""
    window: Positive
    """Tokens of a window."""
    versions: dict[Label, Label]
    """Package -> version, for packages on which the results depend."""
    texts: list[Comparison]
    overall: Comparison


class ExpertErrors(Struct, frozen=True):
    """Relative weight errors of one expert's matrices."""

    layer: Natural
    expert: Natural
    gate: float
    up: float
    down: float
    calibration_tokens: Natural | None = None


class Quality(Struct, frozen=True):
    """The whole file.

    Unknown fields outside of `evaluation` are ignored: no weight depends on this file.
    """

    measure: Label
    totals: dict[Label, float]
    experts: list[ExpertErrors]
    trunk: dict[Label, float]
    uncalibrated: list[Label] = []
    evaluation: Evaluation | None = None


def read_quality(folder: Path) -> Quality | None:
    """Read quality.json in `folder`; None if there is no such file.

    Raises FormatError with the name of an invalid field.
    """
    path = folder / QUALITY_NAME
    with translated(path, "read", DamageError):
        # os.path.lexists would report an unreadable file as missing.
        if not (path.is_symlink() or path.exists()):
            return None
    return typed(_value(folder), Quality, str(folder / QUALITY_NAME))


def save_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write `evaluation` into quality.json in `folder`, in place of an earlier one.

    Other fields stay. Raises DamageError if the file is missing, FormatError if it is invalid.
    """
    value = _value(folder)
    typed(value, Quality, str(folder / QUALITY_NAME))
    write_file(folder / QUALITY_NAME, dump(value | {"evaluation": to_builtins(evaluation)}))


def _value(folder: Path) -> Any:
    return parse(read_small(folder, QUALITY_NAME, str(folder)), str(folder / QUALITY_NAME))
