"""The threads that read experts: what is needed now comes first, guesses give way."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from formats.errors import MoeConvertError
from formats.reading.reader import PIECE_BYTES
from loader.experts.changes import Changes, nothing
from loader.experts.reader_protocol import Load

THREADS = 2
"""Reads at a time: as many as a token misses in a layer. One alone reaches the limit of most disks.
"""
CLOSE_WAIT_S = 5.0
"""How long `close` waits for a read, which a process that ends may leave behind."""


@dataclass(eq=False)
class Job:
    """One expert to be read; a guess until it is `urgent`. `load.done` says how far it has come.

    `finished` is called once, as a change: with the bytes, or with the error, or with neither if it
    was cancelled.
    """

    load: Load
    urgent: bool
    finished: Callable[[Tensor | None, BaseException | None], None]
    buffer: Tensor | None = None
    """What the load writes to."""
    running: bool = False
    cancelled: bool = False
    thread: threading.Thread | None = None
    """What runs it."""


def _is_at_exit() -> bool:
    """Whether the interpreter ends: then only daemon threads wait, which should end with it, not
    with a traceback.
    """
    return not threading.main_thread().is_alive()


class Fetcher:
    """Reading threads. Methods are called as a change of `changes`, which rings whenever a job
    ends; `close` is not.

    Urgent jobs run in order, at once. Guesses run one at a time, only while no urgent job waits or
    runs, in pieces of PIECE_BYTES between which they give way. The threads start with the first
    job.
    """

    def __init__(self) -> None:
        self.changes = Changes()
        self.busy_s = 0.0
        """Seconds in which at least one read was under way."""
        self._urgent: deque[Job] = deque()
        self._guesses: deque[Job] = deque()
        self._running: list[Job] = []
        self._busy_since_s = 0.0
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._then: Callable[[], None] | None = None

    @property
    def guess_is_running(self) -> bool:
        """Whether a guess is being read: an urgent job then shares the disk with it for the rest of
        a piece.
        """
        return any(not job.urgent for job in self._running)

    def submit(self, job: Job) -> None:
        """Queue a job."""
        if self._closed and not _is_at_exit():
            raise MoeConvertError("the model's expert cache is closed", "load the model again")
        self._start_threads()
        (self._urgent if job.urgent else self._guesses).append(job)
        self.changes.ring()

    def promote(self, job: Job) -> None:
        """A guess was right: from now on the job is urgent, also if it was about to end as a wrong
        one.
        """
        if job.urgent:
            return
        job.urgent, job.cancelled = True, False
        if not job.running:
            self._guesses.remove(job)
            self._urgent.append(job)
        self.changes.ring()

    def cancel(self, job: Job) -> None:
        """A guess was wrong: it ends now, or after the piece that is being read."""
        job.cancelled = True
        if not job.running:
            self._guesses.remove(job)
            job.finished(None, None)
            self.changes.ring()

    def mend(self, wanted: Iterable[Job]) -> None:
        """Makes it consistent: the `wanted` jobs are queued or running, others end, and no thread
        is dead.
        """
        left = dict.fromkeys(wanted)
        for job in (*self._urgent, *self._guesses):
            if job not in left and not job.running:
                job.load.close()
        queued = [job for job in (*self._urgent, *self._guesses) if job in left]
        queued = [job for job in dict.fromkeys((*queued, *left)) if not job.running]
        self._urgent = deque(job for job in queued if job.urgent)
        self._guesses = deque(job for job in queued if not job.urgent)
        for job in list(self._running):
            if job not in left:
                job.cancelled = True
            if job.thread and not job.thread.is_alive():
                self._end(job)
                job.finished(None, RuntimeError("the thread that read it has died"))
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        if queued:
            self._start_threads()

    def running(self) -> list[Job]:
        """The jobs that a thread is at."""
        return list(self._running)

    def start_anew(self) -> None:
        """For a forked child, which has none of the threads; what they were reading is read again."""
        self.changes.start_anew()
        self._threads = []
        for job in self._running:
            job.running, job.thread = False, None
        self._running = []

    def close(self, then: Callable[[], None]) -> None:
        """Ends the threads, each after the piece or urgent read it is at, and calls `then` after
        the last one. What waits in the queues is not read. Returns after CLOSE_WAIT_S, even if a
        read takes longer.
        """
        # Not as a change: the garbage collector may call it within one.
        with self.changes.lock:
            self._then, self._closed = then, True
            self.changes.ring()
            threads = [thread for thread in self._threads if thread.is_alive()]
        if not threads:
            self._finish()
        # The last reference may have been a job's, and this its thread.
        elif threading.current_thread() not in threads:
            begin_s = time.monotonic()
            for thread in threads:
                thread.join(max(0.0, begin_s + CLOSE_WAIT_S - time.monotonic()))

    def _finish(self) -> None:
        with self.changes.lock:
            then, self._then = self._then, None
            # It refers to the buffers, which are to be freed with the cache, not when the garbage
            # collector runs.
            self.changes.mend = nothing
        if then:
            then()

    def _start_threads(self) -> None:
        while not self._closed and len(self._threads) < THREADS:
            thread = threading.Thread(target=self._work, name="moe-fetch", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        while True:
            with self.changes.lock, self.changes:
                if self._closed:
                    break
                job = self._next()
                if job:
                    self._begin(job)
                else:
                    bell = self.changes.bell()
            if job:
                self._run(job)
                # Not while waiting for the next one: it holds memory.
                del job
            else:
                bell.get()
        with self.changes.lock, self.changes:
            if not _is_at_exit():
                for job in (*self._urgent, *self._guesses):
                    job.finished(None, MoeConvertError("the model's expert cache was closed"))
                self._urgent.clear()
                self._guesses.clear()
            self._threads.remove(threading.current_thread())
            is_last = not self._threads
            self.changes.ring()
        if is_last:
            self._finish()

    def _run(self, job: Job) -> None:
        blob: Tensor | None = None
        error: BaseException | None = None
        try:
            job.load.step(None if job.urgent else PIECE_BYTES)
            if not job.load.remaining and not job.cancelled:
                blob = job.load.result()
        except BaseException as e:
            error = e
        with self.changes.lock, self.changes:
            self._end(job)
            if job.cancelled:
                job.finished(None, None)
            elif error or blob is not None:
                job.finished(blob, error)
            else:
                # The rest of it goes on at the head of its queue.
                (self._urgent if job.urgent else self._guesses).appendleft(job)
            self.changes.ring()

    def _next(self) -> Job | None:
        if self._urgent:
            return self._urgent.popleft()
        if self._guesses and not self._running:
            return self._guesses.popleft()
        return None

    def _begin(self, job: Job) -> None:
        job.running, job.thread = True, threading.current_thread()
        if not self._running:
            self._busy_since_s = time.perf_counter()
        self._running.append(job)

    def _end(self, job: Job) -> None:
        job.running, job.thread = False, None
        self._running.remove(job)
        if not self._running:
            self.busy_s += time.perf_counter() - self._busy_since_s
