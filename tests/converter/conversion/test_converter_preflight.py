"""A dry run and a conversion report the same errors before the first weight, and write nothing."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hub_server import HubServer

from converter.checkpoint.source import Checkpoint
from converter.conversion import worker_count
from converter.conversion.plan import plan_conversion
from converter.convert import ConvertOptions
from converter.recipe.recipes import make_recipe

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def checkpoint(source: Path, tmp_path: Path) -> Path:
    """A copy of the small checkpoint, to be broken."""
    return Path(shutil.copytree(source, tmp_path / "checkpoint"))


def without_tokenizer(checkpoint: Path, _: pytest.MonkeyPatch) -> list[str]:
    for file in checkpoint.glob("tokenizer*"):
        file.unlink()
    return []


def broken_tokenizer(checkpoint: Path, _: pytest.MonkeyPatch) -> list[str]:
    (checkpoint / "tokenizer.json").write_text("{")
    return []


def remote_code(checkpoint: Path, _: pytest.MonkeyPatch) -> list[str]:
    (checkpoint / "tokenizer.json").unlink()
    file = checkpoint / "tokenizer_config.json"
    config = json.loads(file.read_text()) if file.exists() else {}
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    file.write_text(json.dumps(config))
    return []


def dangling_file(checkpoint: Path, _: pytest.MonkeyPatch) -> list[str]:
    (checkpoint / "generation_config.json").unlink(missing_ok=True)
    (checkpoint / "generation_config.json").symlink_to("nowhere")
    return []


def short_text(checkpoint: Path, _: pytest.MonkeyPatch) -> list[str]:
    (checkpoint.parent / "short.txt").write_text("short")
    return ["--calibrate", str(checkpoint.parent / "short.txt")]


def out_is_source(checkpoint: Path, _: pytest.MonkeyPatch) -> list[str]:
    return ["-o", str(checkpoint), "--force"]


def out_below_a_file(checkpoint: Path, _: pytest.MonkeyPatch) -> list[str]:
    (checkpoint.parent / "a file").touch()
    return ["-o", str(checkpoint.parent / "a file" / "out")]


def full_disk(checkpoint: Path, patch: pytest.MonkeyPatch) -> list[str]:
    patch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(total=1 << 40, used=0, free=1000)
    )
    return []


def little_memory(checkpoint: Path, patch: pytest.MonkeyPatch) -> list[str]:
    patch.setattr(
        psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 20, total=2 << 20)
    )
    patch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(total=0))
    return []


def little_memory_allowed(checkpoint: Path, _: pytest.MonkeyPatch) -> list[str]:
    return ["--max-memory", "1MiB"]


def no_licence(checkpoint: Path, _: pytest.MonkeyPatch) -> list[str]:
    return ["--upload-repo", "me/model"]


BROKEN = [
    # defect, exit code, words of the message and the next step
    (without_tokenizer, 1, ("tokenizer", "--calibrate random")),
    (broken_tokenizer, 1, ("tokenizer.json", "--calibrate random")),
    (remote_code, 1, ("tokenizer", "--calibrate random")),
    (dangling_file, 1, ("generation_config.json", "next:")),
    (short_text, 1, ("short.txt", "longer text")),
    (out_is_source, 1, ("checkpoint", "another")),
    (out_below_a_file, 1, ("a file", "another --out-dir")),
    (full_disk, 4, ("free are 1000", "free some space")),
    (little_memory, 4, ("the machine has 2097152", "--calibrate none")),
    (little_memory_allowed, 4, ("--max-memory 1048576", "use --max-memory")),
    (no_licence, 1, ("licence", "--license")),
]


@pytest.mark.parametrize(
    ("spoil", "code", "words"), BROKEN, ids=[spoil.__name__ for spoil, *_ in BROKEN]
)
def test_dry_run_and_conversion_refuse_the_same_before_anything_is_written(
    run_command: Run,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[..., list[str]],
    code: int,
    words: tuple[str, ...],
) -> None:
    options = spoil(checkpoint, monkeypatch)
    before = everything_below(checkpoint.parent)
    line = ["convert", checkpoint, "-o", checkpoint.parent / "out", *options]
    dry, wet = run_command(*line, "--dry-run"), run_command(*line)
    assert dry == wet
    assert dry[0] == code
    for word in words:
        assert word in dry[2]
    assert everything_below(checkpoint.parent) == before


def everything_below(folder: Path) -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def test_dry_run_of_a_good_checkpoint_writes_nothing_and_asks_no_hub(
    run_command: Run, hub: HubServer, checkpoint: Path
) -> None:
    before = everything_below(checkpoint.parent)
    assert run_command("convert", checkpoint, "-o", checkpoint.parent / "out", "--dry-run")[0] == 0
    assert everything_below(checkpoint.parent) == before
    assert hub.requests == []


@pytest.mark.parametrize("spoil", [without_tokenizer, broken_tokenizer, remote_code])
def test_checkpoint_without_a_usable_tokenizer_converts_without_calibration_by_text(
    run_command: Run,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[..., list[str]],
) -> None:
    spoil(checkpoint, monkeypatch)
    out = checkpoint.parent / "out"
    line = [
        "convert",
        checkpoint,
        "-o",
        out,
        "--calibrate",
        "random",
        "--calibration-tokens",
        "1024",
    ]
    assert run_command(*line)[0] == 0
    assert "no usable tokenizer" in caplog.text
    assert run_command("verify", out, "--read-data")[0] == 0


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_complete_conversion_by_another_recipe_is_refused(
    run_command: Run, converted_copy: Path, example_folder: Path, dry: list[str]
) -> None:
    code, _, err = run_command(
        "convert", example_folder, "-o", converted_copy, "--recipe", "3bit", *dry
    )
    assert code == 1
    assert "another recipe" in err
    assert "--force" in err


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_unfinished_conversion_by_another_recipe_is_refused(
    run_command: Run, source: Path, tmp_path: Path, dry: list[str]
) -> None:
    line = ["convert", source, "-o", tmp_path / "out", "--solver", "hqq"]
    run_command(*line, "--layers", "1/3")
    before = everything_below(tmp_path)
    code, _, err = run_command(*line, "--recipe", "3bit", *dry)
    assert code == 1
    assert "unfinished conversion with another recipe" in err
    assert "--no-resume" in err
    assert everything_below(tmp_path) == before


def test_memory_that_is_short_now_is_a_warning_with_both_numbers(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 20, total=1 << 40)
    )
    with Checkpoint(checkpoint) as opened, caplog.at_level(logging.WARNING):
        checked = plan_conversion(
            opened, make_recipe("2bit"), ConvertOptions(max_workers=2), checkpoint.parent / "out"
        )
    assert checked.workers == 2
    assert f"about {checked.memory_bytes} bytes of memory, 1048576 are available" in caplog.text


def test_workers_are_as_many_as_processors_and_fewer_where_memory_is_short(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_count, "_processors", lambda: 8)

    def workers(available: int) -> Any:
        monkeypatch.setattr(
            psutil, "virtual_memory", lambda: SimpleNamespace(available=available, total=1 << 40)
        )
        with Checkpoint(checkpoint) as opened:
            out = checkpoint.parent / "out"
            return plan_conversion(
                opened, make_recipe("2bit", solver="hqq"), ConvertOptions(max_workers=None), out
            )

    assert workers(1 << 39).workers == 8
    some = workers(400 << 20)
    assert 1 < some.workers < 8
    assert some.memory_bytes <= 0.9 * (400 << 20)


def taken(hub: HubServer) -> list[str]:
    return ["--upload-repo", "me/taken"]


def foreign(hub: HubServer) -> list[str]:
    return ["--upload-repo", "somebody/model"]


def wrong_token(hub: HubServer) -> list[str]:
    return ["--upload-repo", "me/model", "--token", "hf_wrong"]


@pytest.mark.parametrize("dry", [["--dry-run"], []])
@pytest.mark.parametrize(
    ("options", "words"),
    [(taken, "model.safetensors"), (foreign, "no member of somebody"), (wrong_token, "token")],
)
def test_repository_that_cannot_be_written_is_refused_before_the_conversion(
    run_command: Run,
    hub: HubServer,
    checkpoint: Path,
    options: Callable[[HubServer], list[str]],
    words: str,
    dry: list[str],
) -> None:
    hub.add("me/taken", {"model.safetensors": b"weights"})
    out = checkpoint.parent / "out"
    code, _, err = run_command(
        "convert", checkpoint, "-o", out, "--license", "mit", *options(hub), *dry
    )
    assert code == 1
    assert words in err
    assert not out.exists()


def test_upload_without_a_token_is_refused_before_the_bytes_are_read(
    run_command: Run,
    hub: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    converted_copy: Path,
) -> None:
    hub.connect(tmp_path / "home", monkeypatch, token=None)
    code, _, err = run_command("upload", converted_copy, "me/model", "--license", "mit")
    assert code == 1
    assert "no token that may write" in err
    assert "hf auth login" in err
    assert "verifying" not in err


def test_download_into_a_full_disk_is_refused_before_the_first_weight(
    run_command: Run,
    hub: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    converted_copy: Path,
) -> None:
    hub.add("me/model", converted_copy)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(total=1 << 40, used=0, free=1000)
    )
    code, _, err = run_command("download", "me/model", "--local-dir", tmp_path / "here")
    assert code == 4
    assert "only 1000 are free" in err
    # The index alone gives the sizes.
    assert hub.served() == hub.served("moe_index.json")
