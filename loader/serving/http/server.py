"""Runs the application until a signal ends it, within a bounded time."""

import socket
import threading
from types import FrameType

import uvicorn
from fastapi import FastAPI

from formats.errors import MoeConvertError
from loader.serving.engine import Engine

FINISH_S = 5.0
"""After the first signal: what runs may finish for so long, then it is cancelled."""
CANCEL_S = 2.0
"""After that: the longest wait for a token under way, and for connections to close."""


class Server(uvicorn.Server):
    """uvicorn's server over one engine. A signal closes the engine first; a second one ends at
    once.
    """

    def __init__(self, app: FastAPI, engine: Engine) -> None:
        total_s = int(FINISH_S + CANCEL_S)
        # uvicorn would give connections their own time: the engine's streams end by themselves,
        # within total_s.
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=total_s
        )
        super().__init__(config)
        self._engine = engine

    def serve_on(self, listening: socket.socket) -> bool:
        """Serve until a signal; return False if a generation did not end when it was cancelled."""
        self.run(sockets=[listening])
        self._engine.close(0, CANCEL_S)
        return not self._engine.is_working

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ends the server. Not by uvicorn's own way, which raises the signal again when all is
        done.
        """
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True
        # In a thread: signal handlers run in the thread of the event loop, which has streams to
        # end.
        threading.Thread(target=self._engine.close, args=(FINISH_S, CANCEL_S), daemon=True).start()


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to `host` and `port`, 0 for any free one. MoeConvertError if
    that fails.
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
    """Return the address of a bound socket as the beginning of a URL."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
