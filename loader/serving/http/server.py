"""Runs the application until a signal, then stops within a bounded time."""

import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from formats.errors import MoeConvertError
from loader.serving.engine import Engine

FINISH_S = 5.0
"""Time to finish after the first signal, in seconds; then running answers are cancelled."""
CANCEL_S = 2.0
"""Time after that for the last token and for connections to close, in seconds."""


class Server(uvicorn.Server):
    """uvicorn's server. The first signal closes the engine; a second one stops at once.

    engine: the engine that `app` serves, if it has one. on_signal: called at the first signal in
    the event loop's thread.
    """

    def __init__(
        self,
        app: FastAPI,
        engine: Engine | None,
        on_signal: Callable[[], None] = lambda: None,
    ) -> None:
        total_s = int(FINISH_S + CANCEL_S)
        # The engine ends all streams within total_s; uvicorn must not wait longer.
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=total_s
        )
        super().__init__(config)
        self._engine = engine
        self._on_signal = on_signal

    def serve_on(self, listening: socket.socket) -> bool:
        """Serve until a signal. Return False if a cancelled generation did not end."""
        self.run(sockets=[listening])
        if self._engine is None:
            return True
        self._engine.close(0, CANCEL_S)
        return not self._engine.is_working

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop the server. uvicorn's method would raise the signal again at the end."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True
        self._on_signal()
        if self._engine is None:
            return
        # In a thread: this handler runs in the event loop's thread, which must end the streams.
        threading.Thread(target=self._engine.close, args=(FINISH_S, CANCEL_S), daemon=True).start()


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a socket bound to `host` and `port`; port 0 is any free one.

    MoeConvertError if that fails.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as e:
        raise MoeConvertError(
            f"cannot listen on {host} port {port}: {e}", "give another --host or --port"
        ) from e
    bound.listen()
    return bound


def url_of(listening: socket.socket) -> str:
    """Return the URL of a bound socket, without a path."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
