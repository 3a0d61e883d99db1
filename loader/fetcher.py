"""The threads that read experts: what is needed now comes first, guesses give way."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from formats.reader import PIECE_BYTES
from loader.reader import Load

THREADS = 2
"""Reads at a time: as many as a token misses in a layer. One alone reaches the limit of most disks."""


@dataclass(eq=False)
class Job:
    """One expert to be read; a guess until it is `urgent`. `load.done` says how far it has come.

    `finished` is called once, with the lock held: with the bytes, or with the error, or with neither if it was
    cancelled.
    """

    load: Load
    urgent: bool
    finished: Callable[[Tensor | None, BaseException | None], None]
    running: bool = False
    cancelled: bool = False


class Fetcher:
    """Reading threads. Methods are called with `lock` held, which is notified whenever a job ends; `close` takes it.

    Urgent jobs run in order, at once. Guesses run one at a time, only while no urgent job waits or runs, in pieces of
    PIECE_BYTES between which they give way. The threads start with the first job.
    """

    def __init__(self) -> None:
        self.lock = threading.Condition()
        self.busy_s = 0.0
        """Seconds in which at least one read was under way."""
        self._urgent: deque[Job] = deque()
        self._guesses: deque[Job] = deque()
        self._running: list[Job] = []
        self._busy_since_s = 0.0
        self._threads: list[threading.Thread] = []
        self._closed = False

    @property
    def guess_is_running(self) -> bool:
        """Whether a guess is being read: an urgent job then shares the disk with it for the rest of a piece."""
        return any(not job.urgent for job in self._running)

    def submit(self, job: Job) -> None:
        """Queue a job."""
        if not self._threads:
            self._threads = [threading.Thread(target=self._work, name="moe-fetch", daemon=True) for _ in range(THREADS)]
            for thread in self._threads:
                thread.start()
        (self._urgent if job.urgent else self._guesses).append(job)
        self.lock.notify_all()

    def promote(self, job: Job) -> None:
        """A guess was right: from now on the job is urgent, also if it was about to end as a wrong one."""
        if job.urgent:
            return
        job.urgent, job.cancelled = True, False
        if not job.running:
            self._guesses.remove(job)
            self._urgent.append(job)
        self.lock.notify_all()

    def cancel(self, job: Job) -> None:
        """A guess was wrong: it ends now, or after the piece that is being read."""
        job.cancelled = True
        if not job.running:
            self._guesses.remove(job)
            job.finished(None, None)
            self.lock.notify_all()

    def close(self) -> None:
        """Ends the threads, each after the piece or urgent read it is at. What waits in the queues is not read."""
        with self.lock:
            self._closed = True
            self.lock.notify_all()
        for thread in self._threads:
            # The last reference may have been a job's, and this its thread.
            if thread is not threading.current_thread():
                thread.join()

    def _work(self) -> None:
        while True:
            with self.lock:
                while (job := self._next()) is None:
                    if self._closed:
                        return
                    self.lock.wait()
                self._begin(job)
            blob: Tensor | None = None
            error: BaseException | None = None
            try:
                job.load.step(None if job.urgent else PIECE_BYTES)
                if not job.load.remaining and not job.cancelled:
                    blob = job.load.result()
            except BaseException as e:
                error = e
            with self.lock:
                self._end(job)
                if job.cancelled:
                    job.finished(None, None)
                elif error or blob is not None:
                    job.finished(blob, error)
                else:
                    # The rest of it goes on at the head of its queue.
                    (self._urgent if job.urgent else self._guesses).appendleft(job)
                self.lock.notify_all()
            # Not while waiting for the next one: they hold memory.
            del job, blob, error

    def _next(self) -> Job | None:
        if self._closed:
            return None
        if self._urgent:
            return self._urgent.popleft()
        if self._guesses and not self._running:
            return self._guesses.popleft()
        return None

    def _begin(self, job: Job) -> None:
        job.running = True
        if not self._running:
            self._busy_since_s = time.perf_counter()
        self._running.append(job)

    def _end(self, job: Job) -> None:
        job.running = False
        self._running.remove(job)
        if not self._running:
            self.busy_s += time.perf_counter() - self._busy_since_s
