"""Failed commands: exceptions, signals, closed outputs, and control characters in texts."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_folders import copy_of_good
from command_inputs import Inputs
from project_paths import ROOT
from support_hints import hints_in

import formats.reading.verify
from converter.cli.show.failures import failure_of
from converter.cli.show.terminal import printable
from formats.errors import MoeConvertError

Run = Callable[..., tuple[int, str, str]]


ERRORS = [
    (
        OSError(errno.ENOSPC, "No space left on device", "/a/b.partial"),
        4,
        "no space left in /a",
        "run the same",
    ),
    (OSError(errno.EDQUOT, "Disk quota exceeded", "/a/b"), 4, "quota", "free space"),
    (
        OSError(errno.EIO, "Input/output error", "/a/b"),
        1,
        "/a/b: cannot be used: Input/output error",
        "check the disk",
    ),
    (OSError(errno.ESTALE, "Stale file handle", "/a/b"), 1, "/a/b", "mount"),
    (
        PermissionError(errno.EACCES, "Permission denied", "/a/b"),
        1,
        "/a/b: cannot be used: Permission",
        "permissions",
    ),
    (OSError(errno.EROFS, "Read-only file system", "/a/b"), 1, "/a/b", "can be written"),
    (IsADirectoryError(errno.EISDIR, "Is a directory", "/a/b"), 1, "/a/b", "name a file"),
    (
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/a/b"),
        1,
        "/a/b",
        "check the name",
    ),
    (OSError(errno.EMFILE, "Too many open files", "/a/b"), 1, "/a/b", "ulimit"),
    (MemoryError(), 4, "out of memory", "--ram-cache"),
    (
        torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"),
        4,
        "out of memory: CUDA out of memory. Tried",
        "",
    ),
    (
        RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        4,
        "can't allocate",
        "",
    ),
    (
        RuntimeError("boom\nin two lines"),
        1,
        "unexpected RuntimeError: boom in two lines",
        "moe-convert env",
    ),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"), 1, "unexpected UnicodeDecodeError", "-v"),
    (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "connection", "run the same"),
    (
        MoeConvertError("bad \x1b]0;name\x07 \u202e", "do\x9b"),
        1,
        "error: bad \\x1b]0;name\\x07 \\u202e\n",
        "do\\x9b",
    ),
]


@pytest.mark.parametrize(("error", "code", "message", "hint"), ERRORS, ids=lambda x: str(x)[:30])
def test_any_exception_is_one_message_with_a_next_step(
    run_command: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    error: Exception,
    code: int,
    message: str,
    hint: str,
) -> None:
    monkeypatch.setattr(formats.reading.verify, "verify_folder", raising(error))
    got, out, err = run_command("verify", tmp_path)
    assert (got, out) == (code, "")
    assert message in err
    assert hint in hints_in(err)[0]
    assert err.count("\n") == 2


def test_traceback_is_shown_with_verbose(
    run_command: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(formats.reading.verify, "verify_folder", raising(RuntimeError("boom")))
    code, _, err = run_command("verify", tmp_path, "-v")
    assert code == 1
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-2] == "error: unexpected RuntimeError: boom"


def test_unexpected_errors_are_told_from_ours() -> None:
    assert not failure_of(RuntimeError("boom")).expected
    assert failure_of(MoeConvertError("ours")).expected


def raising(error: BaseException) -> Callable[..., Any]:
    def call(*_: object, **__: object) -> None:
        raise error

    return call


def test_names_from_files_cannot_control_the_terminal(run_command: Run, tmp_path: Path) -> None:
    folder = copy_of_good(tmp_path).rename(
        tmp_path / "evil\x1b]0;title\x07\x9b31m\u202etxt.exe\u2066"
    )
    (folder / "LICENSE").unlink()
    code, out, _ = run_command("verify", folder)
    assert code == 3
    assert "evil\\x1b]0;title\\x07\\x9b31m\\u202etxt.exe\\u2066" in out
    assert printable(out) == out
    index = json.loads((folder / "moe_index.json").read_text())
    index["source"]["name"] = "evil\x1b[2J"
    (folder / "moe_index.json").write_text(json.dumps(index))
    code, _, err = run_command("inspect", folder)
    assert code == 3
    assert "found 'evil\\x1b[2J'" in err
    assert printable(err) == err
    index["source"]["name"] = "tiny"
    index["x\x1b[2J\nerror: forged"] = 1
    (folder / "moe_index.json").write_text(json.dumps(index))
    code, _, err = run_command("inspect", folder)
    assert code == 3
    assert printable(err) == err
    assert err.count("error: ") == 2 and err.count("\nerror: ") == 0


def test_log_records_and_warnings_cannot_control_the_terminal(
    run_command: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import logging
    import warnings

    def say(*_: object, **__: object) -> None:
        logging.getLogger("another.library").warning("tensor %s", "\x1b[2J")
        caplog.handler.stream.write(warnings.formatwarning("\x1b[3J", UserWarning, "file.py", 1))
        raise MoeConvertError("done")

    monkeypatch.setattr(formats.reading.verify, "verify_folder", say)
    run_command("verify", tmp_path)
    assert "tensor \\x1b[2J" in caplog.text
    assert "\\x1b[3J" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_a_command_with_what_is_left_and_how_to_go_on(
    run_command: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: signal.Signals
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        signal.raise_signal(number)

    # Where the suite runs in the background, SIGINT is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(formats.reading.verify, "verify_folder", interrupted)
    try:
        code, out, err = run_command("verify", tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (code, out) == (130, "")
    assert err == "interrupted: nothing was changed; the next run starts from the beginning\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_interrupted_conversion_says_that_the_same_command_goes_on(
    run_command: Run, monkeypatch: pytest.MonkeyPatch, inputs: Inputs
) -> None:
    import converter.conversion.flow

    monkeypatch.setattr(converter.conversion.flow, "convert", raising(KeyboardInterrupt()))
    code, _, err = run_command("convert", inputs.checkpoint, "-o", inputs.out, "-q")
    assert (code, err) == (
        130,
        "interrupted: run the same command again: it resumes\n",
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [([], "; to continue, pass the prompt"), (["--json"], "cannot be resumed\n")],
)
def test_an_interrupted_generation_says_how_much_there_is(
    run_command: Run,
    monkeypatch: pytest.MonkeyPatch,
    inputs: Inputs,
    options: list[str],
    words: str,
) -> None:
    from loader.serving.answers.text_stream import TextStream

    push, calls = TextStream.push, iter(range(1, 100))

    def push_three(self: TextStream, token: int) -> str:
        piece = push(self, token)
        if next(calls) == 3:
            raise KeyboardInterrupt
        return piece

    monkeypatch.setattr(TextStream, "push", push_three)
    code, out, err = run_command(
        "generate", inputs.good, "--prompt", "So Jonah arose", "--kernels", "torch", *options
    )
    assert code == 130
    assert bool(out.strip()) == (not options)
    assert "stopped after 3 new tokens" in err
    assert words in err


@pytest.mark.parametrize("target", ["closed pipe", "/dev/full"])
def test_output_that_cannot_be_written_ends_without_a_traceback(target: str) -> None:
    if target == "/dev/full":
        stdout = os.open(target, os.O_WRONLY)
    else:
        read, stdout = os.pipe()
        os.close(read)
    command = [
        sys.executable,
        "-m",
        "converter",
        "verify",
        str(ROOT / "tests" / "vectors" / "folder"),
    ]
    done = subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=60
    )
    os.close(stdout)
    if target == "/dev/full":
        assert (done.returncode, done.stderr.splitlines()[0]) == (
            4,
            "error: No space left on device",
        )
    else:
        assert (done.returncode, done.stderr) == (1, "")
