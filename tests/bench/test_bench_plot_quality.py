"""The plot of docs/quality.md: its content, and the same bytes for the same numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
from plot_quality import main, plot_quality


def record(**changes: Any) -> dict[str, Any]:
    steps: list[Any] = [
        {
            "recipe": recipe,
            "solver": solver,
            "bits": bits,
            "rules": [],
            "kl": kl,
            "kl_error": kl / 20,
        }
        for recipe, bits, kl in (("2bit", 2.506, 0.01), ("3bit", 3.256, 0.003))
        for solver in ("hqq", "feedback:builtin")
    ]
    return {"bench": "quality", "model": "some-model", "steps": steps} | changes


def mixed(recipe: str, bits: float) -> dict[str, Any]:
    step = {"recipe": recipe, "solver": "feedback:builtin", "bits": bits, "rules": ["0=some"]}
    return record(steps=[step | {"kl": 0.005, "kl_error": 0.0001}])


def test_plot_names_models_solvers_and_recipes_and_stays_small(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_quality([record(), record(model="other-model")], tmp_path / "a.svg")
    plot_quality([record(), record(model="other-model")], tmp_path / "b.svg")
    svg = (tmp_path / "a.svg").read_text()
    assert all(
        f">{word}<" in svg
        for word in ("some-model", "other-model", "hqq", "feedback, builtin", "2bit", "3bit")
    )
    assert len(svg) < 60_000
    assert (tmp_path / "b.svg").read_text() == svg


def test_mixed_bits_have_lines_of_their_own_in_their_models_panel_and_no_tick(
    tmp_path: Path,
) -> None:
    pytest.importorskip("matplotlib")
    plot_quality([record(), mixed("2.7bpw", 2.69), mixed("2bit-down3", 2.756)], tmp_path / "a.svg")
    svg = (tmp_path / "a.svg").read_text()
    assert svg.count(">some-model<") == 1
    assert (
        ">feedback, builtin: mixed by target<" in svg
        and ">feedback, builtin: down has more bits<" in svg
    )
    assert ">2.7bpw<" not in svg and ">2bit<" in svg


def test_a_file_of_another_bench_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.json").write_text(json.dumps(record(bench="decode")))
    monkeypatch.setattr(
        "sys.argv", ["plot_quality.py", str(tmp_path / "x.json"), "-o", str(tmp_path / "x.svg")]
    )
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert "x.json: not written by bench/quality.py" in capsys.readouterr().err
    assert not (tmp_path / "x.svg").exists()
