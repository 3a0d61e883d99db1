"""Faults between the loopback Hub and its client, on demand."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Fault:
    """A fault for the next `times` requests (-1: all) whose URL path contains `path`.

    `body` faults affect answers with a file's bytes; the others affect any request.
    """

    kind: str
    path: str = ""
    times: int = 1
    number: int = 0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    action: Callable[[], object] | None = None


class Faults:
    """The pending faults; each method adds one. path: part of the URL path; "" matches any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []

    def drop(self, path: str = "", *, after: int = 0, times: int = 1) -> None:
        """Break the connection after `after` bytes of the body."""
        self._add(Fault("drop", path, times, after))

    def ignore_range(self, path: str = "", *, times: int = 1) -> None:
        """Answer with the whole file and status 200 whatever the requested range."""
        self._add(Fault("ignore_range", path, times))

    def short(self, path: str = "", *, missing: int = 1, times: int = 1) -> None:
        """Answer with the requested Content-Range, but `missing` bytes too few."""
        self._add(Fault("short", path, times, missing))

    def shift(self, path: str = "", *, by: int = 1, times: int = 1) -> None:
        """Answer with another range than the requested one; its Content-Range says so."""
        self._add(Fault("shift", path, times, by))

    def damage(self, path: str = "", *, at: int = 0, times: int = 1) -> None:
        """Change one byte of the body, at offset `at`; the headers stay right."""
        self._add(Fault("damage", path, times, at))

    def change_etag(self, path: str = "", *, times: int = 1) -> None:
        """Answer with another ETag than the file's, as if the file had been replaced."""
        self._add(Fault("etag", path, times))

    def status(self, code: int, path: str = "", *, times: int = 1, **headers: str) -> None:
        """Answer with this status; headers are keywords: `Retry_After="7"`."""
        self._add(
            Fault(
                "status",
                path,
                times,
                status=code,
                headers={k.replace("_", "-"): v for k, v in headers.items()},
            )
        )

    def redirect(self, location: str, path: str = "", *, times: int = 1) -> None:
        """Redirect (302) to `location`."""
        self._add(Fault("status", path, times, status=302, headers={"Location": location}))

    def before(self, path: str, action: Callable[[], object], *, times: int = 1) -> None:
        """Call `action` before the answer: to commit, to count, to wait for an event."""
        self._add(Fault("before", path, times, action=action))

    def take(self, kind: str, path: str) -> Fault | None:
        """Return the first fault of this kind for a request of `path`, and use it up once."""
        with self._lock:
            for fault in self._faults:
                if fault.kind == kind and fault.path in path and fault.times:
                    fault.times -= 1
                    return fault
        return None

    def clear(self) -> None:
        """Remove all pending faults."""
        with self._lock:
            self._faults.clear()

    def _add(self, fault: Fault) -> None:
        with self._lock:
            self._faults.append(fault)
