"""A command does these steps once: open the checkpoint, plan the bytes, tokenize the text, parse
the rules.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
from transformers import AutoTokenizer

from converter.calibration.calibration_text import calibration_tokens
from converter.checkpoint.source import Checkpoint
from converter.output.conversion_sizes import plan_output
from converter.recipe.recipes import make_recipe

Run = Callable[..., tuple[int, str, str]]
STEPS: dict[CodeType, str] = {
    Checkpoint.__init__.__code__: "checkpoint opened",
    plan_output.__code__: "planned",
    calibration_tokens.__code__: "text tokenized",
    AutoTokenizer.from_pretrained.__func__.__code__: "tokenizer opened",
    make_recipe.__code__: "recipe made",
}
CALIBRATED = ("--calibrate", "builtin", "--calibration-tokens", "1024")
ONCE = {"recipe made": 1, "checkpoint opened": 1, "planned": 1, "tokenizer opened": 1}


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the calls of the steps in this thread, for any caller and any imported name."""
    found: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code in STEPS:
            found[STEPS[frame.f_code]] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield found
    finally:
        sys.setprofile(before)


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        (("--solver", "hqq"), ONCE),
        (("--solver", "hqq", "--dry-run"), ONCE),
        (("--solver", "hqq", "--layer-bits", "0=3bit,1/down=4bit"), ONCE),
        (CALIBRATED, ONCE | {"text tokenized": 1}),
        ((*CALIBRATED, "--target-bpw", "9.5", "--dry-run"), ONCE | {"text tokenized": 1}),
        # The bits that were chosen change the plan.
        ((*CALIBRATED, "--target-bpw", "9.5"), ONCE | {"text tokenized": 1, "planned": 2}),
    ],
    ids=["plain", "plain dry run", "rules", "calibrated", "target dry run", "target"],
)
def test_command_does_each_step_once(
    run_command: Run, source: Path, tmp_path: Path, options: tuple[str, ...], counts: dict[str, int]
) -> None:
    with counted() as found:
        code, _, err = run_command("convert", source, "-o", tmp_path / "out", "-q", *options)
    assert (code, err) == (0, "")
    assert found == counts


def test_finding_a_complete_conversion_takes_one_plan(
    run_command: Run, source: Path, tmp_path: Path
) -> None:
    line = ("convert", source, "-o", tmp_path / "out", "-q", "--solver", "hqq")
    run_command(*line)
    with counted() as found:
        assert run_command(*line)[0] == 0
    assert found == ONCE
