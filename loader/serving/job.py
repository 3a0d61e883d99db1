"""A request in the queue or under way."""

import threading
import time
from collections.abc import Callable

from loader.serving.answers.events import Event
from loader.serving.answers.request import Request


class Job:
    """One request; `deliver` gets its events, from the engine's thread."""

    def __init__(self, request: Request, deliver: Callable[[Event], None]) -> None:
        self.request = request
        self.queued_s = time.monotonic()
        self._deliver = deliver
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Ends the job within a token. Any thread may, at any time."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        """True once nobody wants the answer any more."""
        return self._cancelled.is_set()

    def tell(self, event: Event) -> None:
        """Delivers an event. Where nobody can take it the job is cancelled."""
        try:
            self._deliver(event)
        except RuntimeError:
            # The client's event loop is closed.
            self.cancel()
