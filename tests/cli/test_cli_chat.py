"""`moe-convert chat`: a user's input, and the output."""

import io
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from project_paths import ROOT, SUPPORT

import loader
from converter.cli.chat.chat_loop import ChatLoop
from converter.cli.chat.message_input import TypedLines, read_message
from converter.cli.chat.slash_commands import ChatCommands
from converter.cli.show.console import Output, Terminated
from loader.serving.answers.settings import GenerationSettings
from loader.serving.prompts.chat_template import template_of
from loader.serving.session import Session

TEMPLATE = SUPPORT / "serving" / "templates" / "instruct.jinja"
QUESTION = "So Jonah arose, and went to Nineveh"


@pytest.fixture
def run(
    converted: Callable[[str], Path],
    run_command: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Callable[..., tuple[int, str, str]]:
    """Runs `chat` on the converted example with these lines on stdin."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    def call(
        typed: str | io.TextIOBase, *options: object, path: Path | None = None
    ) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(typed) if isinstance(typed, str) else typed)
        folder = path or converted("2bit")
        return run_command("chat", folder, "--kernels", "torch", "--max-new-tokens", 6, *options)

    return call


@pytest.fixture(scope="module")
def model(converted: Callable[[str], Path]) -> Any:
    return loader.from_pretrained(converted("2bit"), kernels="torch")


@pytest.fixture
def session(model: Any, converted: Callable[[str], Path]) -> Session:
    tokenizer = loader.load_tokenizer(converted("2bit"))
    template = template_of(tokenizer, TEMPLATE.read_text())
    return Session(model, tokenizer, template, GenerationSettings(max_new_tokens=6))


class Keyboard(io.StringIO):
    """A stdin that is a terminal."""

    def isatty(self) -> bool:
        return True


class Typed:
    """Lines that a user types; an exception among them is raised in place of a line."""

    is_terminal = True

    def __init__(self, *lines: str | BaseException) -> None:
        self._lines = iter(lines)
        self.prompts: list[str] = []
        self.remembered: list[str] = []

    def read(self, prompt: str) -> str:
        self.prompts.append(prompt)
        line = next(self._lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    def remember(self, message: str) -> None:
        self.remembered.append(message)


def converse(session: Session, model: Any, *lines: str | BaseException) -> Typed:
    typed = Typed(*lines)
    ChatLoop(session, typed, ChatCommands(session, model, "example"), Output(False, False)).run()
    return typed


def test_answers_go_to_stdout_in_turn(run: Any, session: Session) -> None:
    code, out, err = run(f"{QUESTION}\n\nAnd then?\n", "--template", TEMPLATE)
    answers = [session.ask(text, lambda _: None).text for text in (QUESTION, "And then?")]
    assert code == 0
    assert out == "".join(f"{answer}\n" for answer in answers)
    assert err.count("cut after 6 tokens") == 2
    assert "no chat template" not in err


def test_a_template_of_the_tokenizer_is_used(run: Any, templated: Path) -> None:
    _, own, err = run(QUESTION, "--check", "none", path=templated)
    _, given, _ = run(QUESTION, "--template", TEMPLATE)
    assert own == given
    assert "no chat template" not in err


def test_a_model_without_a_template_completes_and_says_so_once(
    run: Any, run_command: Any, converted: Any
) -> None:
    code, out, err = run(f"{QUESTION}\nAnd\n")
    options = ["--kernels", "torch", "--max-new-tokens", 6, "--prompt"]
    first = run_command("generate", converted("2bit"), *options, QUESTION)[1]
    second = run_command("generate", converted("2bit"), *options, f"{QUESTION}\n{first}And")[1]
    assert (code, out) == (0, first + second)
    assert err.count("no chat template") == 1


def test_a_refused_system_message_is_an_error_before_the_weights(
    run: Any, converted_copy: Path, tmp_path: Path
) -> None:
    refusing = tmp_path / "refusing.jinja"
    refusing.write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    )
    (converted_copy / "trunk.safetensors").unlink()
    code, out, err = run(
        "Hello\n", "--template", refusing, "--system", "Be brief", path=converted_copy
    )
    assert (code, out) == (1, "")
    assert "the chat template fails: TemplateError: no system" in err


def test_the_models_own_sampling_is_used_unless_options_say_otherwise(
    run: Any, converted_copy: Path
) -> None:
    config = converted_copy / "generation_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "do_sample": True, "temperature": 3.0})
    )
    greedy = run(QUESTION)[1]
    assert run(QUESTION, "--seed", 1, path=converted_copy)[1] != greedy
    assert run(QUESTION, "--temperature", 0, path=converted_copy)[1] == greedy


def test_an_error_ends_a_piped_chat(run: Any) -> None:
    code, _, err = run("/sytem\n")
    assert code == 1
    assert "unknown command /sytem" in err
    assert "did you mean /system?" in err


def test_an_error_keeps_a_typed_chat(session: Session, model: Any, capsys: Any) -> None:
    converse(session, model, "/nonsense", "\udcff", QUESTION)
    shown = capsys.readouterr()
    assert shown.err.count("error: ") == 2
    assert session.turns == 1


def test_ctrl_c_stops_the_answer_and_keeps_the_session(
    session: Session, model: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loader.serving.answers.text_stream import TextStream

    push, calls = TextStream.push, iter(range(1, 100))

    def push_two(self: TextStream, token: int) -> str:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return push(self, token)

    monkeypatch.setattr(TextStream, "push", push_two)
    converse(session, model, QUESTION, KeyboardInterrupt(), "And then?")
    shown = capsys.readouterr()
    assert [answer.new_tokens for answer in session.answers] == [3, 6]
    assert shown.out == "".join(f"{answer.text}\n" for answer in session.answers)
    # The first at the end of the answer's line, the second at the prompt.
    assert shown.err.split("(cut")[0] == "(stopped; Ctrl-D leaves)\n\n(stopped; Ctrl-D leaves)\n"


def test_sigterm_ends_a_chat(session: Session, model: Any) -> None:
    with pytest.raises(Terminated):
        converse(session, model, Terminated(), QUESTION)
    assert session.turns == 0


def test_the_signal_itself_ends_a_chat(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TypedLines, "read", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    code, _, err = run(Keyboard())
    assert code == 130
    assert err.endswith("interrupted: the conversation was not saved; /save keeps one\n")


def test_commands_do_what_help_says(
    session: Session, model: Any, capsys: Any, tmp_path: Path
) -> None:
    saved = tmp_path / "chat.json"
    converse(
        session,
        model,
        "/system Be brief",
        QUESTION,
        f"/save {saved}",
        "/stats",
        "/help",
        "/system -",
        "/system",
    )
    shown = capsys.readouterr()
    content = json.loads(saved.read_text())
    assert [message["role"] for message in content["messages"]] == ["system", "user", "assistant"]
    assert content["messages"][2]["content"] + "\n" == shown.out
    assert (content["model"], content["settings"]) == ("example", {"max_new_tokens": 6})
    used = session.answers[0].prompt_tokens + 6
    assert f"{used} of 512 tokens, 1 turns" in shown.err
    assert "hit ratio" in shown.err
    assert all(name in shown.err for name in ("/reset", "/save", "/system", "/stats", "/exit"))
    assert shown.err.endswith("System message: none\n\n")
    converse(session, model, f"/save {saved}", "/reset", "/exit", QUESTION)
    assert f"{saved} already exists" in capsys.readouterr().err
    assert session.messages == []


def test_a_full_context_offers_to_drop_the_oldest_turns(
    model: Any, session: Session, converted: Any, capsys: Any
) -> None:
    session.context_tokens = 70
    lines = [QUESTION, QUESTION, QUESTION]
    typed = converse(session, model, *lines, "n", "/reset", *lines, "y")
    assert [prompt for prompt in typed.prompts if prompt.startswith("Drop")] == [
        "Drop the oldest 1 of 2 turns? [Y/n] "
    ] * 2
    shown = capsys.readouterr()
    assert shown.err.count("the context is full: the conversation has") == 2
    assert "The message was not sent" in shown.err
    assert "Dropped the oldest 1 turns" in shown.err
    assert (session.turns, len(session.answers)) == (2, 5)
    converse(session, model, "Jonah " * 70)
    assert "the message alone leaves no room" in capsys.readouterr().err


def test_a_full_context_drops_the_oldest_turns_of_a_pipe(run: Any) -> None:
    code, out, err = run(f"{QUESTION}\n" * 3, "--template", TEMPLATE, "--max-context", 70)
    assert code == 0
    assert err.count("Dropped the oldest 1 turns.") == 1
    assert len(out.splitlines()) >= 3


def test_bytes_that_are_no_text_are_an_error(run: Any) -> None:
    code, out, err = run(io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    assert (code, out) == (1, "")
    assert "the message is not UTF-8" in err


def test_two_slashes_begin_a_message_with_one(session: Session, model: Any) -> None:
    converse(session, model, "//reset is what?")
    assert session.messages[0]["content"] == "/reset is what?"


@pytest.mark.parametrize(
    ("lines", "messages"),
    [
        (["one"], ["one"]),
        (["one\\", "two\\", "three", "four"], ["one\ntwo\nthree", "four"]),
        (['"""one', "two", 'three"""', "four"], ["one\ntwo\nthree", "four"]),
        (['"""', "  one\\", "", "two", '"""'], ["  one\\\n\ntwo"]),
        (['"""one"""'], ["one"]),
        (['"""one', "two"], ["one\ntwo"]),
        (["one\\"], ["one"]),
    ],
)
def test_a_message_may_have_several_lines(lines: list[str], messages: list[str]) -> None:
    typed = Typed(*lines)
    assert [read_message(typed) for _ in messages] == messages
    assert typed.remembered == messages
    with pytest.raises(EOFError):
        read_message(typed)


def test_history_is_the_owners_alone_and_outlives_the_chat(tmp_path: Path) -> None:
    readline = pytest.importorskip("readline")
    path = tmp_path / "state" / "history"
    readline.clear_history()
    lines = TypedLines(path, [])
    lines.remember("a message of mine")
    lines.save()
    assert path.stat().st_mode & 0o777 == 0o600
    readline.clear_history()
    TypedLines(path, [])
    assert readline.get_history_item(1) == "a message of mine"
    readline.clear_history()


class RealTerminal:
    """`moe-convert chat` in a terminal of 80 columns, as pyte shows it."""

    def __init__(self, *arguments: object, home: Path) -> None:
        pyte = pytest.importorskip("pyte")
        fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
        self._screen = pyte.Screen(80, 24)
        self._stream = pyte.ByteStream(self._screen)
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))

        def control() -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [sys.executable, "-m", "converter", "chat", *map(str, arguments)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=control,
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm", "XDG_STATE_HOME": str(home), "LC_ALL": "C.UTF-8"},
        )
        os.close(slave)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, shown: Callable[[list[str]], bool]) -> list[str]:
        """Wait until `shown` is true of the screen's lines, and return them.

        Fails after a minute without output.
        """
        while not shown(lines := [line.rstrip() for line in self._screen.display]):
            ready, _, _ = select.select([self._master], [], [], 60)
            assert ready, "\n".join(lines)
            try:
                self._stream.feed(os.read(self._master, 1 << 16))
            except OSError:
                pytest.fail("the chat ended:\n" + "\n".join(lines))
        return lines

    def end(self) -> int:
        """Return the exit code; read all output until then, so that nothing blocks."""
        while True:
            try:
                if not os.read(self._master, 1 << 16):
                    break
            except OSError:
                break
        code = self.process.wait(60)
        os.close(self._master)
        return code


@pytest.fixture
def terminal(converted: Callable[[str], Path], tmp_path: Path) -> Iterator[RealTerminal]:
    options = ["--kernels", "torch", "--max-new-tokens", 400, "--template", TEMPLATE]
    running = RealTerminal(converted("2bit"), *options, home=tmp_path)
    yield running
    running.process.kill()
    running.process.wait()


def test_a_conversation_at_a_terminal(terminal: RealTerminal, tmp_path: Path) -> None:
    def is_at_prompt(lines: list[str]) -> bool:
        last = [line for line in lines if line][-1:]
        return last == [">"]

    lines = terminal.wait_for(is_at_prompt)
    shown = " ".join(" ".join(lines).split())
    assert "512 tokens of context. /help lists commands, Ctrl-D leaves." in shown
    terminal.type(f"{QUESTION}\r")
    terminal.wait_for(
        lambda lines: f"> {QUESTION}" in lines and any(lines[lines.index(f"> {QUESTION}") + 1 :])
    )
    terminal.type("\x03")
    lines = terminal.wait_for(
        lambda lines: "(stopped; Ctrl-D leaves)" in lines and is_at_prompt(lines)
    )
    # The earlier message comes back by the up key, and the tab key completes a command.
    terminal.type("\x1b[A")
    terminal.wait_for(lambda lines: [line for line in lines if line][-1] == f"> {QUESTION}")
    terminal.type("\x15/st\t\r")
    lines = terminal.wait_for(
        lambda lines: any(line.startswith("context ") for line in lines) and is_at_prompt(lines)
    )
    assert any("512 tokens, 1 turns" in line for line in lines)
    terminal.type("\x04")
    assert terminal.end() == 0
    assert (tmp_path / "moe-convert" / "chat_history").read_text().splitlines()[-2:] == [
        QUESTION,
        "/stats",
    ]
