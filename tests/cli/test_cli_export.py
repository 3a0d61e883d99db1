"""`moe-convert export`: output, options, files that it must not replace."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from exported_models import fields_of, tensors_of

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(run_command: Run) -> Run:
    return partial(run_command, "export")


def test_example_is_exported_and_its_parts_are_told(
    run: Run, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "m.gguf"
    code, said, err = run(converted("2bit"), "-o", out, "--experts", "f16", "--license", "mit")
    assert code == 0
    assert f"wrote {out}" in said
    assert "exporting" in err
    rows = {line.split("  ")[0]: line for line in said.splitlines()}
    assert rows["embeddings"].endswith("exact")
    assert rows["attention"].endswith("rounded to float16")
    assert tensors_of(out)["blk.7.ffn_down_exps.weight"][0] == "F16"
    assert fields_of(out)["general.license"] == "mit"
    assert fields_of(out)["general.name"] == "tiny-mixtral"


def test_json_has_every_parts_type_and_loss(
    run: Run, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "m.gguf"
    code, said, _ = run(converted("16bit"), "-o", out, "--experts", "q8_0", "--json", "-q")
    assert code == 0
    facts = json.loads(said)
    assert facts["bytes"] == out.stat().st_size
    assert (facts["written"], facts["exact"]) == (True, False)
    parts: dict[str, Any] = {part["part"]: part for part in facts["parts"]}
    assert parts["experts down"] == {
        "part": "experts down",
        "stored": "rows-bf16",
        "type": "Q8_0",
        "bits": 8.5,
        "weights": 8 * 8 * 192 * 384,
        "loss": "lossy: requantized",
    }
    assert parts["attention"]["loss"] == "exact"


def test_licence_is_that_of_the_model_card(run: Run, converted_copy: Path, tmp_path: Path) -> None:
    (converted_copy / "README.md").write_text('---\ntags:\n- moe\nlicense: "mit"\n---\nText\n')
    out = tmp_path / "m.gguf"
    assert run(converted_copy, "-o", out, "--experts", "f16")[0] == 0
    assert fields_of(out)["general.license"] == "mit"


def test_dry_run_writes_nothing(run: Run, converted: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    code, said, _ = run(converted("16bit"), "-o", out, "--dry-run")
    assert code == 0
    assert "would write" in said
    assert list(tmp_path.iterdir()) == []


def test_existing_file_is_replaced_only_with_force(
    run: Run, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "m.gguf"
    out.write_text("old")
    assert run(converted("16bit"), "-o", out)[0] == 1
    assert out.read_text() == "old"
    assert run(converted("16bit"), "-o", out, "--force")[0] == 0
    assert fields_of(out)["general.architecture"] == "llama"


@pytest.mark.parametrize("name", ["moe_index.json", "experts/layer-000.safetensors"])
def test_file_of_the_model_is_never_replaced(run: Run, converted_copy: Path, name: str) -> None:
    before = (converted_copy / name).read_bytes()
    code, _, err = run(converted_copy, "-o", converted_copy / name, "--force", "--experts", "f16")
    assert code == 1
    assert "is also read" in err
    assert (converted_copy / name).read_bytes() == before


def test_repository_is_downloaded_and_exported(
    run: Run, hub: Any, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = converted("16bit")
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    hub.add("me/model", files)
    out, other = tmp_path / "m.gguf", tmp_path / "other.gguf"
    assert run("me/model", "-o", out)[0] == 0
    assert run(folder, "-o", other)[0] == 0
    assert out.read_bytes() == other.read_bytes()
