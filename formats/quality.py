"""quality.json: what the conversion measured, and what an evaluation did (docs/quality.md,
"quality.json").
"""

from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct, to_builtins

from formats.config.strict_json import dump, parse, typed
from formats.errors import DamageError
from formats.files.io_errors import translated
from formats.files.paths import read_small
from formats.index import Label, Natural, Positive, Sha256
from formats.writer import write_file

QUALITY_NAME = "quality.json"

Share = Annotated[float, Meta(ge=0, le=1)]
AtLeastZero = Annotated[float, Meta(ge=0)]


class Comparison(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How far the model's predictions are from the original's on one text, or on all.

    `_error` is the standard error, over windows, of the number before it; None for one window.
    perplexity and
    original_perplexity: of both models; ratio: the first over the second, ratio_error: of its
    logarithm. kl: mean over tokens of KL(original || model), nats. agreement: share of tokens at
    which both have the same first choice.
    routers: per layer, share of tokens for which both choose the same set of experts. sha256: of
    the text's bytes.
    """

    name: Label
    windows: Positive
    tokens: Positive
    perplexity: AtLeastZero
    original_perplexity: AtLeastZero
    ratio: AtLeastZero
    ratio_error: AtLeastZero | None
    kl: float
    kl_error: AtLeastZero | None
    agreement: Share
    routers: list[Share]
    sha256: Sha256 | None = None


class Evaluation(Struct, frozen=True, forbid_unknown_fields=True):
    """A comparison with the original: its folder's name, tokens a window, what the numbers depend
    on, results.
    """

    original: Label
    window: Positive
    versions: dict[Label, Label]
    texts: list[Comparison]
    overall: Comparison


class ExpertErrors(Struct, frozen=True):
    """Relative weight errors of one expert's projections."""

    layer: Natural
    expert: Natural
    gate: float
    up: float
    down: float
    calibration_tokens: Natural | None = None


class Quality(Struct, frozen=True):
    """The whole file. Fields of later releases are let pass in all but the evaluation: no weight
    depends on them.
    """

    measure: Label
    totals: dict[Label, float]
    experts: list[ExpertErrors]
    trunk: dict[Label, float]
    uncalibrated: list[Label] = []
    evaluation: Evaluation | None = None


def read_quality(folder: Path) -> Quality | None:
    """What quality.json in `folder` says, None if there is none; FormatError naming the field if it
    is not as here.
    """
    path = folder / QUALITY_NAME
    with translated(path, "read", DamageError):
        # Not os.path.lexists: it also takes a file that cannot be read for none.
        if not (path.is_symlink() or path.exists()):
            return None
    return typed(_value(folder), Quality, str(folder / QUALITY_NAME))


def save_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Puts `evaluation` into quality.json in `folder`, in place of an earlier one; all else stays
    as it is.

    FormatError or DamageError if there is no proper quality.json to put it into.
    """
    value = _value(folder)
    typed(value, Quality, str(folder / QUALITY_NAME))
    write_file(folder / QUALITY_NAME, dump(value | {"evaluation": to_builtins(evaluation)}))


def _value(folder: Path) -> Any:
    return parse(read_small(folder, QUALITY_NAME, str(folder)), str(folder / QUALITY_NAME))
