"""A request that waits in the queue or runs."""

import threading
import time
from collections.abc import Callable

from loader.serving.answers.events import Event
from loader.serving.answers.request import Request


class Job:
    """One request. deliver: receives its events in the engine's thread."""

    def __init__(self, request: Request, deliver: Callable[[Event], None]) -> None:
        self.request = request
        self.queued_s = time.monotonic()
        self._deliver = deliver
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """End the job within one token. Any thread may call this at any time."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        """True after `cancel`."""
        return self._cancelled.is_set()

    def tell(self, event: Event) -> None:
        """Deliver an event. Cancel the job if its receiver is gone."""
        try:
            self._deliver(event)
        except RuntimeError:
            # The client's event loop is closed.
            self.cancel()
