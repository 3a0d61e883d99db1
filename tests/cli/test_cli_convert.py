"""convert, inspect, verify, env as a user calls them: output, JSON, exit codes."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from convert_fixtures import run, source

from converter.cli.main import COMMANDS, cli

__all__ = ["run", "source"]


def test_convert_inspect_verify(run: Any, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text, _ = run("convert", source, "-o", out, "--json")
    facts = json.loads(text)
    assert (code, facts["done"], facts["recipe"]) == (0, "converted", "2bit")
    code, text, _ = run("inspect", out, "--json", "--experts")
    shown = json.loads(text)
    assert (code, shown["experts"], len(shown["layers"])) == (0, 8, 2)
    code, text, _ = run("verify", out, "--read-data", "--json")
    assert (code, json.loads(text)["ok"]) == (0, True)
    code, text, _ = run("inspect", out, "--experts")
    assert "tile32-q2-g16-s4" in text and "experts/layer-001.safetensors" in text


def test_damage_is_exit_3_and_named(run: Any, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("convert", source, "-o", out, "-q", "--solver", "hqq")
    file = out / "experts" / "layer-001.safetensors"
    data = bytearray(file.read_bytes())
    offset = json.loads((out / "moe_index.json").read_text())["layers"][1]["experts"][2]["offset"]
    data[offset + 200] ^= 1
    file.write_bytes(data)
    assert run("verify", out)[0] == 0
    code, text, _ = run("verify", out, "--read-data", "--json")
    (problem,) = json.loads(text)["problems"]
    assert code == 3
    assert (problem["layer"], problem["expert"], problem["offset"]) == (1, 2, offset)
    os.truncate(file, 100)
    assert run("verify", out)[0] == 3
    assert run("inspect", out)[0] == 3


def test_dry_run_prints_sizes_and_writes_nothing(run: Any, source: Path, tmp_path: Path) -> None:
    code, text, _ = run("convert", source, "-o", tmp_path / "out", "--dry-run", "--json")
    facts = json.loads(text)
    assert code == 0
    assert not (tmp_path / "out").exists()
    for name in (
        "source_bytes",
        "converted_bytes",
        "expert_bits",
        "attention_bits",
        "memory_bytes",
        "free_disk_bytes",
        "files",
    ):
        assert facts[name] > 0
    run("convert", source, "-o", tmp_path / "out", "-q", "--solver", "hqq")
    written = sum(f.stat().st_size for f in (tmp_path / "out").rglob("*.safetensors"))
    assert abs(written - facts["converted_bytes"]) <= 4096 * facts["files"]


@pytest.mark.parametrize(
    ("args", "code", "word"),
    [
        (["--recipe", "5bit"], 2, "5bit"),
        (["--bits", "7"], 2, "7 bits"),
        (["--layers", "1of2"], 2, "I/N"),
        (["--layers", "3/2"], 2, "3/2"),
        (["--max-memory", "lots"], 2, "lots"),
        (["--max-memory", "1MiB"], 4, "--max-memory"),
        (["--max-workers", "0"], 2, "max-workers"),
        (["--nonsense"], 2, "--nonsense"),
    ],
)
def test_bad_options_exit_with_their_code(
    run: Any,
    source: Path,
    tmp_path: Path,
    args: list[str],
    code: int,
    word: str,
) -> None:
    got, out, err = run("convert", source, "-o", tmp_path / "out", *args)
    assert (got, out) == (code, "")
    assert word in err
    assert not (tmp_path / "out").exists()


def test_missing_source_says_how_to_fetch_it(run: Any, tmp_path: Path) -> None:
    code, out, err = run("convert", "nobody/nothing", "-o", tmp_path / "out")
    assert (code, out) == (1, "")
    assert "HF_HUB_OFFLINE" in err
    assert "hf download nobody/nothing" in err
    assert "Traceback" not in err


def test_converted_folder_that_lost_its_index_is_damaged(run: Any, converted_copy: Path) -> None:
    (converted_copy / "moe_index.json").unlink()
    code, _, err = run("inspect", converted_copy)
    assert code == 3
    assert "moe_index.json is missing" in err


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help_with_an_example_and_json(name: str) -> None:
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0
    assert f"moe-convert {name}" in result.output
    # A conversation has no one result.
    assert name == "chat" or "--json" in result.output


def test_help_comes_without_loading_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from converter.cli.main import cli; cli(['--help'], standalone_mode=False);"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion_knows_the_commands(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_MOE_CONVERT_COMPLETE", f"{shell}_complete")
    monkeypatch.setenv("COMP_WORDS", "moe-convert in")
    monkeypatch.setenv("COMP_CWORD", "in" if shell == "fish" else "1")
    result = CliRunner().invoke(cli, [], prog_name="moe-convert")
    assert "inspect" in result.output
