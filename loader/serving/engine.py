"""The queue of jobs and the one thread that generates: first come, first served."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from formats.errors import MoeConvertError
from loader.serving.answers.events import Counts, End, Event, Failure
from loader.serving.answers.request import Request
from loader.serving.answers.streamed_answer import StreamedAnswer
from loader.serving.answers.token_loop import CancelledError
from loader.serving.answers.vocabulary import Vocabulary
from loader.serving.job import Job
from loader.serving.metrics import Metrics
from loader.serving.prefixes.prefix_store import PrefixStore

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    max_context: tokens of a prompt with its answer. max_queue: requests that may wait while one
    runs. prefix_bytes: memory for kept prefix caches.
    """

    max_context: int
    max_queue: int = 16
    prefix_bytes: int = 1 << 30


class QueueFullError(MoeConvertError):
    """The queue is full. retry_after_s: estimated wait for a free place, in whole seconds."""

    def __init__(self, length: int, retry_after_s: int) -> None:
        super().__init__(
            f"the queue is full: {length} requests wait", f"try again in {retry_after_s} s"
        )
        self.retry_after_s = retry_after_s


class ClosedError(MoeConvertError):
    """The server is shutting down."""


class Engine:
    """Generates answers with one model, in its own thread."""

    def __init__(self, model: Any, tokenizer: Any, limits: Limits) -> None:
        self.model = model
        self.limits = limits
        self.vocabulary = Vocabulary(model, tokenizer)
        self.metrics = Metrics()
        self._prefixes = PrefixStore(limits.prefix_bytes, model)
        self._changed = threading.Condition()
        self._queue: deque[Job] = deque()
        self._running: Job | None = None
        self._is_closed = False
        self._usual_s = 1.0
        # A daemon thread: a hanging generation must not keep the process alive.
        self._thread = threading.Thread(target=self._work, name="moe-convert-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, deliver: Callable[[Event], None]) -> Job:
        """Put a request into the queue.

        deliver: receives its events in the engine's thread; the last is End or Failure. Raises
        QueueFullError and ClosedError.
        """
        job = Job(request, deliver)
        with self._changed:
            if self._is_closed:
                raise ClosedError(
                    "the server is shutting down", "send the request to another server, or later"
                )
            self._drop_cancelled()
            if len(self._queue) >= self.limits.max_queue + (self._running is None):
                self.metrics.add("requests_refused_queue_full")
                raise QueueFullError(len(self._queue), max(1, math.ceil(self._usual_s)))
            self._queue.append(job)
            self._changed.notify_all()
        return job

    def gauges(self) -> dict[str, float]:
        """Return the values of `metrics.GAUGES`."""
        with self._changed:
            self._drop_cancelled()
            return {
                "queue_length": len(self._queue),
                "generations_running": int(self._running is not None),
                "prefix_cache_bytes": self._prefixes.n_bytes,
                "prefix_cache_limit_bytes": self.limits.prefix_bytes,
                "prefix_cache_entries": len(self._prefixes),
            }

    def metrics_text(self) -> str:
        """Return all metrics as Prometheus text."""
        return self.metrics.text(self.gauges(), self.model.moe_stats().total)

    def close(self, finish_s: float, cancel_s: float = 2.0) -> None:
        """Accept no more requests, wait `finish_s` seconds for all jobs, then cancel the rest and
        wait `cancel_s` seconds for the thread.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._queue and self._running is None, finish_s)
            for job in (*self._queue, *([self._running] if self._running else ())):
                job.cancel()
        self._thread.join(cancel_s)

    @property
    def is_working(self) -> bool:
        """True until the engine is closed and its last generation is over."""
        return self._thread.is_alive()

    def _drop_cancelled(self) -> None:
        """Remove waiting jobs whose client has disconnected."""
        cancelled = [job for job in self._queue if job.is_cancelled]
        for job in cancelled:
            self._queue.remove(job)
            self.metrics.add("generations_cancelled")
            job.tell(Failure(cancelled=True))

    def _work(self) -> None:
        while True:
            with self._changed:
                self._running = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._queue or self._is_closed)
                if not self._queue:
                    return
                job = self._running = self._queue.popleft()
            begin_s = time.monotonic()
            self.metrics.add("queue_seconds", begin_s - job.queued_s)
            event = self._answered(job)
            spent_s = time.monotonic() - begin_s
            self.metrics.add("generation_seconds", spent_s)
            self._usual_s += (spent_s - self._usual_s) / 4
            with self._changed:
                # Before the client sees the end, so that its next request finds a free place.
                self._running = None
            job.tell(event)

    def _answered(self, job: Job) -> End | Failure:
        """Run one job, deliver its pieces, and return its last event. An error becomes a Failure:
        the thread must survive.
        """
        counts = Counts(len(job.request.prompt), 0, 0)
        if job.is_cancelled:
            self.metrics.add("generations_cancelled")
            return Failure(cancelled=True, counts=counts)
        try:
            with torch.inference_mode():
                return self._generated(job)
        except Exception as e:
            _log.error(
                "a generation failed: %s: %s",
                type(e).__name__,
                e,
                exc_info=_log.isEnabledFor(logging.DEBUG),
            )
            self.metrics.add("generations_failed")
            return Failure(f"{type(e).__name__}: {e}", counts=counts)

    def _generated(self, job: Job) -> End | Failure:
        begin_s = time.monotonic()
        request = job.request
        answer = StreamedAnswer(self.model, self.vocabulary, request)
        cache, cached = self._prefixes.take(request.prompt)
        self.metrics.add("prompt_tokens", len(request.prompt))
        self.metrics.add("prompt_tokens_cached", cached)
        is_cancelled = False
        counted = 0
        try:
            for piece in answer.pieces(cache.kv, lambda: job.is_cancelled):
                if not counted:
                    self.metrics.add("prompt_seconds", time.monotonic() - begin_s)
                self.metrics.add("generated_tokens", answer.new_tokens - counted)
                counted = answer.new_tokens
                if piece.text or piece.logprobs:
                    job.tell(piece)
        except CancelledError:
            is_cancelled = True
        self._prefixes.keep(cache, answer.tokens, answer.prompt_tokens)
        counts = Counts(len(request.prompt), cached, answer.new_tokens)
        if is_cancelled:
            self.metrics.add("generations_cancelled")
            return Failure(cancelled=True, counts=counts)
        self.metrics.add("generations")
        return End(answer.reason, counts)
