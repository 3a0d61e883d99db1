"""The threads that read experts: demand reads go first, prefetches give way."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from formats.errors import MoeConvertError
from formats.reading.reader import STEP_BYTES
from loader.experts.monitor import Monitor, nothing
from loader.experts.reader_protocol import Load

THREADS = 2
"""Reads at a time: the most that a token misses in a layer. One reaches most disks' limit."""
CLOSE_WAIT_S = 5.0
"""Seconds that `close` waits for a read. A process may exit while a read is under way."""


@dataclass(eq=False)
class Job:
    """One expert to be read: a demand read if it is `urgent`, else a prefetch.

    `finished` is called once, under the monitor: with the bytes, with the error, or with neither if
    the job was cancelled.
    """

    load: Load
    urgent: bool
    finished: Callable[[Tensor | None, BaseException | None], None]
    buffer: Tensor | None = None
    """The buffer that the load writes to."""
    running: bool = False
    cancelled: bool = False
    thread: threading.Thread | None = None
    """The thread that runs it."""


def _is_at_exit() -> bool:
    """True if the interpreter ends. Daemon threads then wait for its end, without a traceback."""
    return not threading.main_thread().is_alive()


class Fetcher:
    """Reading threads, started by the first job.

    Urgent jobs run at once, in order. Guesses run one at a time, only while no urgent job waits or
    runs; after each piece of STEP_BYTES they give way. All methods except `close` are called under
    `monitor`, which notifies whenever a job ends.
    """

    def __init__(self) -> None:
        self.monitor = Monitor()
        self.busy_s = 0.0
        """Seconds with at least one read under way."""
        self._urgent: deque[Job] = deque()
        self._guesses: deque[Job] = deque()
        self._running: list[Job] = []
        self._busy_since_s = 0.0
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._then: Callable[[], None] | None = None

    @property
    def guess_is_running(self) -> bool:
        """True if a guess is being read; an urgent job then shares the disk for its piece."""
        return any(not job.urgent for job in self._running)

    def submit(self, job: Job) -> None:
        """Queue a job. Raises MoeConvertError after `close`."""
        if self._closed and not _is_at_exit():
            raise MoeConvertError("the model's expert cache is closed", "load the model again")
        self._start_threads()
        (self._urgent if job.urgent else self._guesses).append(job)
        self.monitor.notify_all()

    def promote(self, job: Job) -> None:
        """Make a guess urgent, because it was right; also one that was just cancelled."""
        if job.urgent:
            return
        job.urgent = True
        job.cancelled = False
        if not job.running:
            self._guesses.remove(job)
            self._urgent.append(job)
        self.monitor.notify_all()

    def cancel(self, job: Job) -> None:
        """Cancel a wrong guess: now, or after the piece that is being read."""
        job.cancelled = True
        if not job.running:
            self._guesses.remove(job)
            job.finished(None, None)
            self.monitor.notify_all()

    def repair(self, wanted: Iterable[Job]) -> None:
        """Make the queues consistent after an interrupted change.

        Afterwards the `wanted` jobs are queued or running, all others end, and no job belongs to a
        dead thread.
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
                job.finished(None, RuntimeError("the thread that read the expert has died"))
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        if queued:
            self._start_threads()

    def running(self) -> list[Job]:
        """Return the running jobs."""
        return list(self._running)

    def start_anew(self) -> None:
        """Prepare for use in a forked child, which has none of the threads: reads start again."""
        self.monitor.start_anew()
        self._threads = []
        for job in self._running:
            job.running = False
            job.thread = None
        self._running = []

    def close(self, then: Callable[[], None]) -> None:
        """End the threads after their current piece or urgent read, then call `then`.

        Queued jobs are not read. Returns after CLOSE_WAIT_S seconds even if a read takes longer.
        """
        # Only the lock, not a block: the garbage collector may call this within a block.
        with self.monitor.lock:
            self._then = then
            self._closed = True
            self.monitor.notify_all()
            threads = [thread for thread in self._threads if thread.is_alive()]
        if not threads:
            self._finish()
        # A reading thread may close the cache: its job can hold the last reference.
        elif threading.current_thread() not in threads:
            begin_s = time.monotonic()
            for thread in threads:
                thread.join(max(0.0, begin_s + CLOSE_WAIT_S - time.monotonic()))

    def _finish(self) -> None:
        with self.monitor.lock:
            then = self._then
            self._then = None
            # `repair` refers to the buffers; without it they are freed together with the cache, not
            # later by the garbage collector.
            self.monitor.repair = nothing
        if then:
            then()

    def _start_threads(self) -> None:
        while not self._closed and len(self._threads) < THREADS:
            thread = threading.Thread(target=self._work, name="moe-fetch", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        while True:
            with self.monitor.lock, self.monitor:
                if self._closed:
                    break
                job = self._next()
                if job:
                    self._begin(job)
                else:
                    waiter = self.monitor.waiter()
            if job:
                self._run(job)
                # The job holds memory: drop it before waiting for the next one.
                del job
            else:
                waiter.get()
        with self.monitor.lock, self.monitor:
            if not _is_at_exit():
                for job in (*self._urgent, *self._guesses):
                    job.finished(None, MoeConvertError("the model's expert cache was closed"))
                self._urgent.clear()
                self._guesses.clear()
            self._threads.remove(threading.current_thread())
            is_last = not self._threads
            self.monitor.notify_all()
        if is_last:
            self._finish()

    def _run(self, job: Job) -> None:
        blob: Tensor | None = None
        error: BaseException | None = None
        try:
            job.load.step(None if job.urgent else STEP_BYTES)
            if not job.load.remaining and not job.cancelled:
                blob = job.load.result()
        except BaseException as e:
            error = e
        with self.monitor.lock, self.monitor:
            self._end(job)
            if job.cancelled:
                job.finished(None, None)
            elif error or blob is not None:
                job.finished(blob, error)
            else:
                # The next piece is read first of its queue.
                (self._urgent if job.urgent else self._guesses).appendleft(job)
            self.monitor.notify_all()

    def _next(self) -> Job | None:
        if self._urgent:
            return self._urgent.popleft()
        if self._guesses and not self._running:
            return self._guesses.popleft()
        return None

    def _begin(self, job: Job) -> None:
        job.running = True
        job.thread = threading.current_thread()
        if not self._running:
            self._busy_since_s = time.perf_counter()
        self._running.append(job)

    def _end(self, job: Job) -> None:
        job.running = False
        job.thread = None
        self._running.remove(job)
        if not self._running:
            self.busy_s += time.perf_counter() - self._busy_since_s
