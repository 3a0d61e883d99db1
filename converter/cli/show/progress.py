"""Progress of long work: a bar on a terminal, a line now and then elsewhere."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from converter.cli.show.error_stream import notes_stream, write_line

LINE_EVERY_S = 30.0
"""Interval of progress lines if stderr is not a terminal."""


class ShowProgress(Protocol):
    """Shows the progress of stages, one at a time, on stderr."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` is done. `done` = `total` ends the stage."""

    def close(self) -> None:
        """End the present stage, if there is one."""


def show_progress(unit: str | None) -> ShowProgress:
    """Return a bar if stderr is a terminal, else lines. unit: what is counted; None is bytes."""
    return _Bar(unit) if notes_stream().isatty() else _Lines(unit)


class NoProgress:
    """Shows nothing."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class _Bar:
    """A bar for each stage. Lines that are written to sys.stderr meanwhile appear above it."""

    def __init__(self, unit: str | None) -> None:
        self._unit = unit
        self._stage = ""
        self._progress: Any = None
        self._task: Any = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self.close()
        if self._progress is None:
            self._open(stage, done, total)
        self._progress.update(self._task, completed=done, total=total)
        if done >= total:
            self.close()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        self._stage = ""

    def _open(self, stage: str, done: int, total: int) -> None:
        # Imported when the first bar is drawn: light commands draw none.
        from rich.progress import Progress

        self._stage = stage
        # Results on stdout may go to a file: only stderr is redirected.
        self._progress = Progress(
            *_columns(self._unit),
            console=_console(),
            redirect_stdout=False,
        )
        self._task = self._progress.add_task(stage, completed=done, total=total)
        self._progress.start()


def _console() -> Any:
    from rich.console import Console

    stream = notes_stream()
    # A console on sys.stderr follows it to the object that rich puts in its place.
    if stream is sys.stderr:
        return Console(stderr=True, highlight=False)
    return Console(file=stream, highlight=False)


def _columns(unit: str | None) -> list[Any]:
    """Return the columns of a bar."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    name = TextColumn("{task.description}", markup=False)
    bar = BarColumn(bar_width=20)
    left = TimeRemainingColumn(elapsed_when_finished=True)
    if unit is None:
        return [name, bar, DownloadColumn(), TransferSpeedColumn(), left]
    return [name, bar, MofNCompleteColumn(), TextColumn(unit, markup=False), left]


class _Lines:
    """A line at the end of each stage and every LINE_EVERY_S; of bytes one at the beginning too."""

    def __init__(self, unit: str | None) -> None:
        self._unit = unit
        self._stage = ""
        self._started_s = 0.0
        self._last_s = 0.0
        self._first = 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage = stage
            self._started_s = now
            self._last_s = now
            self._first = done
            if self._unit is not None and done < total:
                return
        elif now - self._last_s < LINE_EVERY_S and done < total:
            return
        self._last_s = now
        rate = (done - self._first) / max(now - self._started_s, 1e-9)
        left = f", {(total - done) / rate:.0f} s left" if rate > 0 and done < total else ""
        share = 100 * done / total if total else 100
        write_line(f"{stage}: {self._counted(done, total, rate, share)}{left}")

    def close(self) -> None:
        self._stage = ""

    def _counted(self, done: int, total: int, rate: float, share: float) -> str:
        if self._unit is not None:
            return f"{done} of {total} {self._unit} ({share:.0f} %)"
        speed = f", {rate / 1e6:.0f} MB/s" if rate > 0 else ""
        return f"{done / 1e6:.1f} of {total / 1e6:.1f} MB ({share:.0f} %){speed}"


@contextmanager
def show_busy(text: str) -> Iterator[None]:
    """Show that work of unknown length goes on, until the context ends."""
    with _spinner(text) if notes_stream().isatty() else _lines_now_and_then(text):
        yield


@contextmanager
def _spinner(text: str) -> Iterator[None]:
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    console = _console()
    with Progress(*columns, console=console, redirect_stdout=False, transient=True) as progress:
        progress.add_task(text, total=None)
        yield


@contextmanager
def _lines_now_and_then(text: str) -> Iterator[None]:
    is_over = threading.Event()
    started_s = time.monotonic()

    def work() -> None:
        while not is_over.wait(LINE_EVERY_S):
            write_line(f"{text}: {time.monotonic() - started_s:.0f} s so far")

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
