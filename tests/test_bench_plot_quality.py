"""The plot of docs/quality.md: what it shows, and the same bytes for the same numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
from plot_quality import expert_bits, main, plot_quality


def record(**changes: Any) -> dict[str, Any]:
    steps = [
        {"recipe": recipe, "solver": solver, "expert_bits": 9.0, "kl": kl, "kl_error": kl / 20}
        for recipe, kl in (("2bit", 0.01), ("3bit", 0.003))
        for solver in ("hqq", "feedback:builtin")
    ]
    return {"bench": "quality", "model": "some-model", "steps": steps} | changes


def test_bits_are_those_of_the_recipe_at_the_sizes_of_8x7b() -> None:
    assert expert_bits("2bit") == pytest.approx(2.506, abs=0.001)
    assert expert_bits("4bit") == pytest.approx(4.256, abs=0.001)


def test_plot_names_models_solvers_and_recipes_and_stays_small(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_quality([record(), record(model="other-model")], tmp_path / "a.svg")
    plot_quality([record(), record(model="other-model")], tmp_path / "b.svg")
    svg = (tmp_path / "a.svg").read_text()
    assert all(f">{word}<" in svg for word in ("some-model", "other-model", "hqq", "feedback, builtin", "2bit", "3bit"))
    assert len(svg) < 60_000
    assert (tmp_path / "b.svg").read_text() == svg


def test_a_file_of_another_bench_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.json").write_text(json.dumps(record(bench="decode")))
    monkeypatch.setattr("sys.argv", ["plot_quality.py", str(tmp_path / "x.json"), "-o", str(tmp_path / "x.svg")])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert "x.json: not written by bench/quality.py" in capsys.readouterr().err
    assert not (tmp_path / "x.svg").exists()
