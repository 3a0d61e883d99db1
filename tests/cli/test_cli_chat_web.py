"""`moe-convert chat --web`: a chat page over a loaded model or over a running server."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import aclosing
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from project_paths import ROOT
from served import LIMITS, PausedModel, engine_of

import loader
from loader.serving.answers.settings import GenerationSettings
from loader.serving.engine import Engine

pytest.importorskip("gradio", reason="needs the extra web")

from web_pages import Browser, page_of

from converter.cli.chat.chat_server import ChatServer
from converter.cli.chat.page_answers import PageAnswers, PageMessage, messages_of
from converter.cli.chat.page_guard import refusal_of
from converter.cli.chat.remote_chat import RemoteChat

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
    with engine_of(model, tokenizer, LIMITS) as engine:
        yield engine


@pytest.fixture
def url(engine: Engine, tokenizer: Any) -> Iterator[str]:
    """A page and its API."""
    with page_of(engine, tokenizer) as url:
        yield url


@pytest.fixture(scope="module")
def started_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(started_browser: Browser, url: str) -> Browser:
    """A browser with the page open."""
    started_browser.open(url)
    return started_browser


def answers_of(url: str, model: str = "tiny") -> PageAnswers:
    return PageAnswers(RemoteChat(ChatServer(url), model, None), GenerationSettings())


def asked(
    url: str,
    question: str,
    history: list[PageMessage],
    tokens: int | str = 8,
    *,
    temperature: str = "0",
    model: str = "tiny",
) -> list[list[PageMessage]]:
    """All states of an answer."""

    async def collect() -> list[list[PageMessage]]:
        states = answers_of(url, model).answer(question, history, "", temperature, str(tokens))
        return [state async for state in states]

    return asyncio.run(collect())


def text_of(message: PageMessage) -> str:
    return "".join(part["text"] for part in message["content"])


def user(content: str) -> PageMessage:
    return {"role": "user", "content": content}


def assistant(content: str, title: str | None = None) -> PageMessage:
    parts = [{"type": "text", "text": content}]
    return {"role": "assistant", "content": parts, "metadata": {"title": title}}


def test_text_of_an_answer_grows(url: str) -> None:
    texts = [text_of(message) for (message,) in asked(url, QUESTION, [])]
    assert len(texts) > 1
    assert all(later.startswith(text) for text, later in pairwise(texts))
    assert texts[0] != texts[-1]


def test_next_turn_reuses_the_prefix_with_its_answer(
    url: str, engine: Engine, tokenizer: Any
) -> None:
    first = text_of(asked(url, QUESTION, [])[-1][0])
    asked(url, "More", [user(QUESTION), assistant(first)])
    prompt = len(tokenizer(f"{QUESTION}\n")["input_ids"])
    assert engine.metrics.value("prompt_tokens_cached") > prompt


def test_cancelled_answer_frees_the_model_while_the_prompt_is_computed(
    url: str, model: PausedModel, engine: Engine
) -> None:
    async def cancel() -> None:
        states = answers_of(url).answer(QUESTION, [], "", "0", "400")
        running = asyncio.create_task(anext(states))
        await asyncio.to_thread(model.wait_for_pass)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    model.pause()
    asyncio.run(cancel())
    assert_freed(url, model, engine)


def test_closed_answer_frees_the_model(url: str, model: PausedModel, engine: Engine) -> None:
    async def close() -> None:
        async with aclosing(answers_of(url).answer(QUESTION, [], "", "0", "400")) as states:
            await anext(states)
            await asyncio.to_thread(model.wait_for_pass)

    model.pause_after(8)
    asyncio.run(close())
    assert_freed(url, model, engine)


def assert_freed(url: str, model: PausedModel, engine: Engine) -> None:
    with httpx.Client(base_url=url, timeout=60) as client:
        # The server sees the end of the first connection before it answers on another one.
        client.get("/health")
        client.get("/health")
    model.resume()
    assert text_of(asked(url, QUESTION, [])[-1][0])
    assert engine.metrics.value("generations_cancelled") == 1
    assert engine.metrics.value("generated_tokens") < 50


@pytest.mark.parametrize("tokens", [LIMITS.max_context, ""])
def test_answer_gets_the_rest_of_the_context(url: str, engine: Engine, tokens: int | str) -> None:
    """With a limit beyond it, or with none."""
    asked(url, f"{QUESTION} " * 30, [], tokens)
    total = engine.metrics.value("prompt_tokens") + engine.metrics.value("generated_tokens")
    assert total == LIMITS.max_context


def test_full_context_is_a_message_with_the_next_step(url: str) -> None:
    (message,) = asked(url, f"{QUESTION} " * 200, [])[-1]
    assert message["metadata"]["title"] == "Error"
    assert "the context is 512 tokens" in text_of(message)
    assert "clear the conversation" in text_of(message)


def test_server_that_is_gone_is_a_message() -> None:
    (message,) = asked("http://127.0.0.1:9", QUESTION, [])[-1]
    assert message["metadata"]["title"] == "Error"
    assert "cannot connect" in text_of(message) and "moe-convert serve" in text_of(message)


@pytest.mark.parametrize(
    ("temperature", "tokens", "text"),
    [
        ("0", "0", "max_new_tokens: 0"),
        ("0", "1.5", "'1.5' is not a whole number"),
        ("warm", "8", "'warm' is not a number"),
        ("-1", "8", "temperature: -1"),
        ("nan", "8", "temperature: nan"),
    ],
)
def test_wrong_setting_is_a_message(url: str, temperature: str, tokens: str, text: str) -> None:
    (message,) = asked(url, QUESTION, [], tokens, temperature=temperature)[-1]
    assert text in text_of(message)


def test_empty_temperature_is_left_to_the_server(url: str) -> None:
    (message,) = asked(url, QUESTION, [], 1, temperature=" ")[-1]
    assert message.get("metadata") is None and text_of(message)


def test_errors_and_questions_without_an_answer_are_not_sent() -> None:
    history = [
        user("stopped"),
        user("first"),
        assistant("one"),
        user("failed"),
        assistant("no room", "Error"),
    ]
    sent = [(m["role"], m["content"]) for m in messages_of("Be brief.", history, "second")]
    assert sent == [
        ("system", "Be brief."),
        ("user", "first"),
        ("assistant", "one"),
        ("user", "second"),
    ]


@pytest.mark.parametrize(
    ("host", "origin", "reason"),
    [
        ("127.0.0.1:7860", None, None),
        ("localhost:7860", "http://localhost:7860", None),
        ("[::1]:7860", None, None),
        ("evil.example", None, "evil.example"),
        ("127.0.0.1.evil.example:7860", None, "evil.example"),
        ("", None, "not this machine"),
        ("[::1", None, "not valid"),
        ("127.0.0.1:7860", "http://evil.example", "evil.example"),
        ("127.0.0.1:7860", "http://127.0.0.1:8080", "not this page"),
        ("127.0.0.1:7860", "null", "null"),
    ],
)
def test_requests_of_other_hosts_and_sites_are_refused(
    host: str, origin: str | None, reason: str | None
) -> None:
    refusal = refusal_of(host, origin)
    assert refusal is None if reason is None else reason in str(refusal)


@pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/info", "/v1/models"])
def test_every_route_is_guarded_and_forbids_other_addresses(url: str, path: str) -> None:
    refused = httpx.get(url + path, headers={"Host": "evil.example"})
    assert refused.status_code == 403 and "evil.example" in refused.text
    answered = httpx.get(url + path)
    assert answered.status_code == 200
    assert answered.headers["content-security-policy"].startswith("default-src 'self'")


def test_page_without_gradio_fails_before_the_model_is_loaded(
    run_command: Run, converted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "loader.from_pretrained", lambda *_, **__: pytest.fail("the model was loaded")
    )
    monkeypatch.setattr("converter.cli.options.early_checks.find_spec", lambda name: None)
    code, _, err = run_command("chat", converted("2bit"), "--web")
    assert code == 1
    assert "pip install 'moe-convert[web]'" in err


def test_port_needs_a_page(run_command: Run, converted: Callable[[str], Path]) -> None:
    code, _, err = run_command("chat", converted("2bit"), "--port", 0)
    assert code == 2 and "--port needs --web" in err


def test_port_that_is_taken_is_named_before_the_model_is_loaded(
    run_command: Run, converted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "loader.from_pretrained", lambda *_, **__: pytest.fail("the model was loaded")
    )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = run_command("chat", converted("2bit"), "--web", "--port", port)
    assert code == 1 and f"port {port}" in err


def test_page_of_a_server_has_its_model_and_the_given_settings(
    run_command: Run, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from starlette.testclient import TestClient

    pages = []

    def keep(app: Any, engine: Any, listening: socket.socket, *_: object) -> None:
        assert engine is None
        assert listening.getsockname()[0] == "127.0.0.1"
        listening.close()
        pages.append(TestClient(app, base_url="http://127.0.0.1"))

    monkeypatch.setattr("converter.cli.chat.web_chat.run_server", keep)
    options = ["--web", "--port", 0, "--system", "Be brief.", "--temperature", 0.5]
    code, _, err = run_command("chat", "--url", url, *options, "--max-new-tokens", 7)
    assert code == 0, err
    assert "chat page: http://127.0.0.1:" in err
    config = pages[0].get("/config").json()
    assert config["title"] == "tiny"
    values = {
        component["props"].get("label"): component["props"].get("value")
        for component in config["components"]
    }
    assert values["System message"] == "Be brief."
    assert (values["Temperature (0 is greedy)"], values["Max new tokens"]) == ("0.5", "7")


def test_sigterm_ends_a_page_that_a_browser_holds_open(converted: Callable[[str], Path]) -> None:
    command = [sys.executable, "-m", "converter", "chat", str(converted("2bit"))]
    command += ["--web", "--port", "0"]
    environment = {**os.environ, "MOE_CONVERT_API_KEY": "not for the page"}
    page = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    assert page.stderr
    try:
        said = ""
        while not (found := re.search(r"chat page: (http://127\.0\.0\.1:\d+)", said)):
            line = page.stderr.readline()
            assert line, said
            said += line
        # The example has no template: the messages are lines of a text.
        assert "no chat template" in httpx.get(f"{found[1]}/config").text
        assert text_of(asked(found[1], QUESTION, [], model=converted("2bit").name)[-1][0])
        heartbeat = f"{found[1]}/gradio_api/heartbeat/session"
        with httpx.stream("GET", heartbeat, timeout=60) as stream:
            beats = stream.iter_lines()
            next(beats)
            page.send_signal(signal.SIGTERM)
            list(beats)
        assert page.wait(timeout=60) == 0
        said = page.stderr.read()
        assert "the server has stopped" in said
        # uvicorn's message if it had to cut the connection.
        assert "timeout graceful shutdown exceeded" not in said
    finally:
        page.kill()
        page.wait()
        page.stderr.close()


def test_browser_shows_an_answer_while_it_grows(
    browser: Browser, model: PausedModel, url: str
) -> None:
    model.pause_after(16)
    browser.send(QUESTION)
    model.wait_for_pass()
    before = browser.answers[0]
    model.resume()
    browser.wait_for_end()
    assert len(browser.answers[0]) > len(before)
    assert browser.title == "tiny"
    assert "Gradio" not in browser.text


def test_browser_requests_nothing_from_elsewhere(browser: Browser, url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.setblocking(False)
        browser.send(f"![a picture](http://127.0.0.1:{elsewhere.getsockname()[1]}/picture.png)")
        browser.wait_for_end()
        requested = browser.requests()
        assert requested
        assert [request for request in requested if not request.startswith(url)] == []
        with pytest.raises(BlockingIOError):
            elsewhere.accept()


def test_stop_in_the_browser_frees_the_engine(
    browser: Browser, model: PausedModel, engine: Engine, url: str
) -> None:
    model.pause_after(16)
    browser.send(QUESTION)
    model.wait_for_pass()
    browser.stop()
    browser.wait_for_end()
    assert_freed(url, model, engine)


def test_leaving_the_page_frees_the_engine(
    browser: Browser, model: PausedModel, engine: Engine, url: str
) -> None:
    model.pause_after(16)
    browser.send(QUESTION)
    model.wait_for_pass()
    browser.leave()
    assert_freed(url, model, engine)


def test_second_turn_in_the_browser_goes_on_from_the_first(
    browser: Browser, engine: Engine, tokenizer: Any
) -> None:
    browser.send(QUESTION)
    browser.wait_for_end()
    browser.send("More")
    browser.wait_for_end()
    assert len(browser.answers) == 2 and all(browser.answers)
    prompt = len(tokenizer(f"{QUESTION}\n")["input_ids"])
    assert engine.metrics.value("prompt_tokens_cached") > prompt


def test_browser_shows_an_error_as_a_message(browser: Browser) -> None:
    browser.send(f"{QUESTION} " * 50)
    browser.wait_for_end()
    browser.wait_for(lambda: "the context is 512 tokens" in browser.answers[0])
    assert "clear the conversation" in browser.answers[0]
