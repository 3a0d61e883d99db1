"""`moe-convert chat --url`: a conversation with a running server."""

import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from served import PausedModel, engine_of, served

import loader
from converter.cli.chat.chat_server import ChatServer, ServerError
from converter.cli.chat.remote_chat import RemoteChat
from loader.serving.answers.settings import GenerationSettings
from loader.serving.conversation import ContextFullError
from loader.serving.engine import Engine, Limits

QUESTION = "So Jonah arose, and went to Nineveh"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(converted: Callable[[str], Path]) -> PausedModel:
    return PausedModel(loader.from_pretrained(converted("2bit"), kernels="torch"))


@pytest.fixture(scope="module")
def tokenizer(converted: Callable[[str], Path]) -> Any:
    return loader.load_tokenizer(converted("2bit"))


@pytest.fixture
def engine(model: PausedModel, tokenizer: Any) -> Iterator[Engine]:
    with engine_of(model, tokenizer, Limits(128, 4, 64 << 20)) as engine:
        yield engine


@pytest.fixture
def url(engine: Engine, tokenizer: Any) -> Iterator[str]:
    with served(engine, tokenizer) as url:
        yield url


@pytest.fixture
def run(run_command: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `chat --url` with these lines on stdin."""

    def call(url: str, typed: str, *options: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        return run_command("chat", "--url", url, *options)

    return call


class Scripted(BaseHTTPRequestHandler):
    """Answers with `answers`: status, and a body or the data of events."""

    answers: list[tuple[int, list[str]]]
    bodies: list[Any]

    def do_POST(self) -> None:
        self.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        status, lines = self.answers.pop(0)
        self.send_response(status)
        self.end_headers()
        self.wfile.write("".join(lines).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def scripted() -> Iterator[tuple[str, type[Scripted]]]:
    """Yield the URL and the handler of a server with a test's answers."""
    handler = type("Handler", (Scripted,), {"answers": [], "bodies": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", handler
        server.shutdown()


def chunk(text: str = "", reason: str | None = None) -> str:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": reason}
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


def remote(url: str, tokens: int | None = 4) -> Any:
    return RemoteChat(ChatServer(url), "m", None).session(GenerationSettings(), tokens, "Be brief.")


def test_answers_are_those_of_the_server(run: Run, url: str, engine: Engine) -> None:
    code, out, err = run(url, f"{QUESTION}\nMore\n/stats\n", "--max-new-tokens", 5)
    assert code == 0, err
    assert out.strip()
    assert "2, 10 tokens" in err and "of 128 tokens, 2 turns" in err
    assert "expert cache" not in err
    assert engine.metrics.value("generated_tokens") == 10


def test_the_conversation_goes_on_from_its_prefix_cache(url: str) -> None:
    chat = RemoteChat.connect(url, None, None)
    session = chat.session(GenerationSettings(temperature=0), 4, "")
    session.ask(QUESTION, lambda piece: None)
    second = session.ask("More", lambda piece: None)
    assert second.reused_tokens > 0
    assert [m["role"] for m in session.messages] == ["user", "assistant"] * 2


def test_leaving_an_answer_frees_the_server(url: str, model: PausedModel, engine: Engine) -> None:
    session = RemoteChat.connect(url, None, "tiny").session(GenerationSettings(), 64, "")

    def stop(piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.ask(QUESTION, stop)
    assert session.answers[0].finish_reason == "interrupted"
    assert session.turns == 1
    assert session.ask("Again", lambda piece: None).new_tokens > 0


def test_a_full_context_drops_the_oldest_turns(run: Run, url: str) -> None:
    typed = "".join(f"{QUESTION} {i}\n" for i in range(8))
    code, _, err = run(url, typed, "--max-new-tokens", 8)
    assert code == 0, err
    assert "Dropped the oldest" in err


def test_a_message_beyond_the_context_is_an_error(run: Run, url: str) -> None:
    code, _, err = run(url, f"{QUESTION} " * 40 + "\n", "--max-new-tokens", 8)
    assert code == 1
    assert "the message alone leaves no room" in err


def test_settings_are_sent_only_if_given(scripted: tuple[str, type[Scripted]]) -> None:
    url, handler = scripted
    handler.answers += [(200, [chunk("Hi"), chunk(reason="stop"), "data: [DONE]\n\n"])] * 2
    answer = remote(url, None).ask("Hello", lambda piece: None)
    assert (answer.text, answer.finish_reason, answer.new_tokens) == ("Hi", "stop", 1)
    settings = GenerationSettings(temperature=0.5, min_p=0.1, seed=7)
    RemoteChat(ChatServer(url), "m", None).session(settings, 9, "").ask("Hello", lambda piece: None)
    fixed = {"model", "messages", "stream", "stream_options"}
    assert set(handler.bodies[0]) == fixed
    assert handler.bodies[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    sent = {name: value for name, value in handler.bodies[1].items() if name not in fixed}
    assert sent == {"temperature": 0.5, "min_p": 0.1, "seed": 7, "max_tokens": 9}


@pytest.mark.parametrize(
    ("status", "error", "kind", "text"),
    [
        (401, {"message": "wrong key"}, ServerError, "MOE_CONVERT_API_KEY"),
        (429, {"message": "busy"}, ServerError, "status 429: busy"),
        (400, {"message": "x is wrong"}, ServerError, "x is wrong"),
        (400, {"message": "full", "code": "context_length_exceeded"}, ContextFullError, "full"),
    ],
)
def test_a_refusal_says_what_the_server_says(
    scripted: tuple[str, type[Scripted]],
    status: int,
    error: dict[str, str],
    kind: type[Exception],
    text: str,
) -> None:
    url, handler = scripted
    handler.answers.append((status, [json.dumps({"error": error})]))
    with pytest.raises(kind, match=text):
        remote(url).ask("Hello", lambda piece: None)


def test_an_error_in_the_stream_keeps_the_text_before_it(
    scripted: tuple[str, type[Scripted]],
) -> None:
    url, handler = scripted
    handler.answers.append((200, [chunk("Half"), 'data: {"error": {"message": "broke"}}\n\n']))
    session = remote(url)
    with pytest.raises(ServerError, match="broke"):
        session.ask("Hello", lambda piece: None)
    assert session.messages[-1] == {"role": "assistant", "content": "Half"}


@pytest.mark.parametrize("answer", ["<html>", "[]", "data: nonsense\n\n"])
def test_another_kind_of_server_is_no_crash(
    scripted: tuple[str, type[Scripted]], answer: str
) -> None:
    url, handler = scripted
    handler.answers.append((200, [answer]))
    assert remote(url).ask("Hello", lambda piece: None).text == ""


def test_no_server_says_how_to_start_one(run: Run) -> None:
    code, _, err = run("http://127.0.0.1:9", "Hello\n")
    assert code == 1
    assert "cannot connect" in err and "moe-convert serve" in err


@pytest.mark.parametrize("url", ["nonsense", "ftp://host/x", "http://"])
def test_an_address_that_is_none_is_an_error(run: Run, url: str) -> None:
    code, _, err = run(url, "Hello\n")
    assert code == 1
    assert "check the address" in err or "moe-convert serve" in err


def test_the_key_is_sent(engine: Engine, tokenizer: Any, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("secret\n")
    with served(engine, tokenizer, key="secret") as url:
        assert run(url, "Hello\n", "--max-new-tokens", 2)[0] == 1
        assert run(url, "Hello\n", "--max-new-tokens", 2, "--api-key-file", file)[0] == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--ram-cache", "1GiB"], "--ram-cache has no effect with --url"),
        (["--max-context", "99"], "--max-context has no effect with --url"),
        (["some-folder"], "one of them"),
        (["--model", "other"], "does not serve other"),
    ],
)
def test_options_of_a_loaded_model_are_refused(
    run: Run, url: str, options: list[str], text: str
) -> None:
    code, _, err = run(url, "Hello\n", *options)
    assert code in (1, 2)
    assert text in err
