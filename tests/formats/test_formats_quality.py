"""quality.json: strict reading; an evaluation keeps the results of the conversion."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from formats.errors import DamageError, FormatError
from formats.quality import Comparison, Evaluation, read_quality, save_evaluation
from formats.reading.verify import verify_folder


def comparison(name: str, **changes: Any) -> Comparison:
    facts: dict[str, Any] = {
        "windows": 2,
        "tokens": 510,
        "perplexity": 61.2,
        "original_perplexity": 60.5,
        "ratio": 1.0116,
        "ratio_error": 0.002,
        "kl": 0.0071,
        "kl_error": 0.0003,
        "agreement": 0.93,
        "routers": [0.9, 0.95],
    }
    return Comparison(name, **(facts | changes))


def evaluation(**changes: Any) -> Evaluation:
    facts: dict[str, Any] = {
        "original": "mixtral", "window": 256, "versions": {"torch": "2.13.0"},
        "texts": [comparison("a.txt", sha256="0" * 64)], "overall": comparison("overall"),
    }  # fmt: skip
    return Evaluation(**(facts | changes))


def test_an_evaluation_is_read_as_it_was_saved(converted_copy: Path) -> None:
    save_evaluation(converted_copy, evaluation())
    quality = read_quality(converted_copy)
    assert quality and quality.evaluation == evaluation()


def test_saving_keeps_all_else_and_replaces_the_last_evaluation(converted_copy: Path) -> None:
    file = converted_copy / "quality.json"
    before = json.loads(file.read_text()) | {"of_a_later_release": [1]}
    file.write_text(json.dumps(before))
    save_evaluation(converted_copy, evaluation(window=512))
    save_evaluation(converted_copy, evaluation())
    after = json.loads(file.read_text())
    assert after.pop("evaluation")["window"] == 256
    assert after == before


def test_what_a_conversion_measured_is_read(converted: Callable[[str], Path]) -> None:
    quality = read_quality(converted("2bit"))
    assert quality and quality.evaluation is None
    assert 0 < quality.totals["experts"] < 1
    assert len(quality.experts) == 64
    assert quality.experts[9].layer == 1 and quality.experts[9].expert == 1


def test_one_window_has_no_standard_error(converted_copy: Path) -> None:
    one = comparison("overall", windows=1, ratio_error=None, kl_error=None)
    save_evaluation(converted_copy, evaluation(overall=one))
    quality = read_quality(converted_copy)
    assert quality and quality.evaluation and quality.evaluation.overall.kl_error is None


def test_verification_does_not_call_an_evaluation_damage(converted_copy: Path) -> None:
    save_evaluation(converted_copy, evaluation())
    assert verify_folder(converted_copy, read_data=True).problems == []


def test_no_file_is_no_quality_and_nothing_to_save_into(tmp_path: Path) -> None:
    assert read_quality(tmp_path) is None
    with pytest.raises(DamageError, match=r"quality\.json"):
        save_evaluation(tmp_path, evaluation())


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (("window",), "256", r"Expected `int`.*\$\.evaluation\.window.*found '256'"),
        (("window",), 0, r">= 1.*\$\.evaluation\.window"),
        (("overall", "agreement"), 1.5, r"<= 1.*\$\.evaluation\.overall\.agreement"),
        (("overall", "routers"), [True], r"\$\.evaluation\.overall\.routers\[0\]"),
        (("overall", "extra"), 1, r"unknown field `extra`.*\$\.evaluation\.overall"),
        (("extra",), 1, r"unknown field `extra`"),
        (
            ("texts",),
            [{"name": "a"}],
            r"missing required field `windows`.*\$\.evaluation\.texts\[0\]",
        ),
        (("original",), None, r"Expected `str`"),
    ],
)
def test_a_wrong_field_is_named(
    converted_copy: Path, place: tuple[str, ...], value: Any, named: str
) -> None:
    save_evaluation(converted_copy, evaluation())
    file = converted_copy / "quality.json"
    whole = json.loads(file.read_text())
    part = whole["evaluation"]
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    file.write_text(json.dumps(whole))
    with pytest.raises(FormatError, match=named):
        read_quality(converted_copy)


def test_not_a_number_is_refused(converted_copy: Path) -> None:
    save_evaluation(converted_copy, evaluation())
    file = converted_copy / "quality.json"
    file.write_text(file.read_text().replace("0.0071", "NaN"))
    with pytest.raises(FormatError, match="NaN is not JSON"):
        read_quality(converted_copy)
