"""Servers on the loopback interface for tests, and models that wait or answer as a test wants."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import torch

from loader.serving.answers.events import End, Event, Failure, Piece
from loader.serving.answers.request import Request, Sampling
from loader.serving.engine import Engine, Limits
from loader.serving.http.app import AppOptions, build_app
from loader.serving.http.server import Server, bound_socket, url_of

TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
TOOL_TEMPLATE = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + TEMPLATE
LIMITS = Limits(max_context=512, max_queue=4, prefix_bytes=64 << 20)
WAIT_S = 60


class _Over:
    """A model over another one."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class PausedModel(_Over):
    """Waits before each forward pass while it is paused."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._open = threading.Event()
        self._open.set()
        self._entered = threading.Event()
        self._last_pass: int | None = None
        self.passes = 0

    def __call__(self, **arguments: Any) -> Any:
        if self.passes == self._last_pass:
            self.pause()
        self.passes += 1
        if not self._open.is_set():
            self._entered.set()
        assert self._open.wait(WAIT_S)
        return self._model(**arguments)

    def pause(self) -> None:
        self._entered.clear()
        self._open.clear()

    def pause_after(self, passes: int) -> None:
        """Pause as soon as so many more passes have ended."""
        self._entered.clear()
        self._last_pass = self.passes + passes

    def wait_for_pass(self) -> None:
        """Until a pass waits."""
        assert self._entered.wait(WAIT_S)

    def resume(self) -> None:
        self._last_pass = None
        self._open.set()


class ScriptedModel(_Over):
    """Answers every prompt of several tokens with the same tokens."""

    def __init__(self, model: Any, tokens: list[int]) -> None:
        super().__init__(model)
        self._tokens = tokens
        self._next = 0

    def __call__(self, **arguments: Any) -> Any:
        output = self._model(**arguments)
        self._next = 0 if arguments["input_ids"].shape[1] > 1 else self._next + 1
        output.logits = torch.full_like(output.logits, -10.0)
        output.logits[0, -1, self._tokens[self._next]] = 10.0
        return output


class Heard:
    """The events of one job."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._ended = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if not isinstance(event, Piece):
            self._ended.set()

    def end(self) -> End | Failure:
        """The last event."""
        assert self._ended.wait(WAIT_S)
        last = self.events[-1]
        assert not isinstance(last, Piece)
        return last

    def text(self) -> str:
        """The whole text."""
        self.end()
        return "".join(event.text for event in self.events if isinstance(event, Piece))


def greedy(prompt: tuple[int, ...], tokens: int, **options: Any) -> Request:
    """Return a greedy request for `tokens` tokens."""
    return Request(tuple(prompt), tokens, Sampling(temperature=0), **options)


def ask(engine: Engine, request: Request) -> Heard:
    """Submit a request, and return all its events."""
    heard = Heard()
    engine.submit(request, heard)
    heard.end()
    return heard


@contextlib.contextmanager
def engine_of(model: Any, tokenizer: Any, limits: Limits = LIMITS) -> Iterator[Engine]:
    """An engine that is closed afterwards."""
    engine = Engine(model, tokenizer, limits)
    try:
        yield engine
    finally:
        engine.close(finish_s=0)


@contextlib.contextmanager
def served(engine: Engine, tokenizer: Any, **options: Any) -> Iterator[str]:
    """The URL of a server of the model "tiny", which is ended afterwards."""
    options = {"template": TEMPLATE, **options}
    listening = bound_socket("127.0.0.1", 0)
    app = build_app(engine, tokenizer, AppOptions("tiny", **options))
    with running(Server(app, engine), listening):
        yield url_of(listening)


@contextlib.contextmanager
def running(server: Server, listening: socket.socket) -> Iterator[None]:
    """Runs a server in a thread and ends it afterwards."""
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(WAIT_S)
