"""Byte ranges of files on a Hub: exactly the requested bytes, or a HubError.

huggingface_hub's file system object accepts any answer, even if the server ignores the range. Here
the status must be 206 (200 for a whole file), Content-Range and length must be the requested ones,
and commit, ETag and size sent by the first host must be the known ones. The caller checks the hash.
"""

import contextlib
import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

from formats.errors import HubError

MAX_REDIRECTS = 5
PROGRESS_BYTES = 1 << 20
"""An attempt that read this much before the connection broke does not count as a failure."""
AGAIN_HINT = "run the same command again: it goes on where it stopped"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at a commit.

    etag: the sha256 of an LFS file, git's sha1 of another file. size: in bytes.
    """

    name: str
    url: str
    """Address of the file at the commit, on the host that gets the token."""
    repo: str
    commit: str
    size: int
    etag: str

    @property
    def sha256(self) -> str | None:
        """The file's sha256 in hex, or None if the Hub does not state it."""
        return self.etag if re.fullmatch("[0-9a-f]{64}", self.etag) else None

    def hasher(self) -> Any:
        """Return a new hash object whose hexdigest over the whole file is `etag`."""
        return hashlib.sha256() if self.sha256 else hashlib.sha1(b"blob %d\0" % self.size)

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit[:12]}: {self.name}"


@dataclass(frozen=True)
class Retries:
    """Number of attempts and waits between them.

    Waits double from `first_s`. A server's Retry-After is obeyed up to `longest_s`. wait: sleeps
    that many seconds; if it returns True, as a set threading.Event does, attempts end.
    """

    attempts: int = 6
    first_s: float = 1.0
    longest_s: float = 300.0
    wait: Callable[[float], object] = time.sleep

    def pause(self, failures: int, asked_s: float | None) -> bool:
        """Wait after failure number `failures` (from 1); return False if attempts must end.

        asked_s: the pause that the server asks for.
        """
        return not self.wait(
            min(self.longest_s, self.first_s * 2 ** (failures - 1)) if asked_s is None else asked_s
        )


class _Failed(Exception):
    """A failed attempt, which may be tried again unless `is_final`.

    asked_s: the pause that the server asks for.
    """

    def __init__(self, what: str, asked_s: float | None = None, *, is_final: bool = False) -> None:
        super().__init__(what)
        self.asked_s = asked_s
        self.is_final = is_final


class RangeReader:
    """Reads ranges. Several threads may use it.

    session: returns the HTTP client (`range_client`, an httpx client). headers: sent
    only to the host of a file's own URL, because they contain the token. transport_errors: the
    client's exceptions for broken connections and timeouts. address_errors: those for a redirect
    to an invalid address.
    """

    def __init__(
        self,
        session: Callable[[], Any],
        headers: Mapping[str, str],
        transport_errors: tuple[type[Exception], ...],
        address_errors: tuple[type[Exception], ...] = (),
        *,
        timeout_s: float = 10.0,
        retries: Retries | None = None,
    ) -> None:
        self._session = session
        self._headers = dict(headers)
        self._transport_errors = transport_errors
        self._address_errors = address_errors
        self._timeout_s = timeout_s
        self._retries = retries or Retries()
        self._locations: dict[str, str] = {}
        """The address to which a file's URL was redirected last."""

    def read(self, file: RemoteFile, begin: int, end: int) -> bytes:
        """Return bytes [begin, end) of `file`, never other or fewer bytes. Raises HubError."""
        return b"".join(self.chunks(file, begin, end))

    def read_into(self, file: RemoteFile, begin: int, view: memoryview) -> None:
        """Fill `view` with the bytes from `begin` on. Raises HubError; `view` is then undefined."""
        position = 0
        for chunk in self.chunks(file, begin, begin + len(view)):
            view[position : position + len(chunk)] = chunk
            position += len(chunk)

    def chunks(self, file: RemoteFile, begin: int, end: int) -> Iterator[bytes]:
        """Yield bytes [begin, end) in order. After a broken connection it requests the rest.

        Raises HubError.
        """
        if not 0 <= begin <= end <= file.size:
            raise HubError(f"{file}: bytes {begin} to {end} asked for, it has {file.size}")
        position = begin
        attempt_begin = begin
        failures = 0
        while position < end:
            failed = None
            try:
                with self._answer(file, position, end) as answer:
                    for chunk in answer.iter_raw():
                        if position + len(chunk) > end:
                            raise _Failed("more bytes than were asked for")
                        position += len(chunk)
                        yield chunk
                if position < end:
                    failed = _Failed(f"{end - position} bytes too few")
            except _Failed as e:
                failed = e
            except self._transport_errors as e:
                failed = _Failed(f"{type(e).__name__}: {e}")
            except self._address_errors as e:
                failed = _Failed(f"redirected to an invalid address: {e}", is_final=True)
            if failed is None:
                continue
            # Outside of the except clauses: the error's context would hold the request's headers.
            failures = 1 if position - attempt_begin >= PROGRESS_BYTES else failures + 1
            attempt_begin = position
            self._after_failure(file, failed, failures)

    def _after_failure(self, file: RemoteFile, failed: _Failed, failures: int) -> None:
        if failed.is_final:
            raise HubError(f"{file}: {failed}")
        if failures >= self._retries.attempts:
            raise HubError(f"{file}: {failed}; gave up after {failures} attempts", AGAIN_HINT)
        if (failed.asked_s or 0) > self._retries.longest_s:
            raise HubError(
                f"{file}: {failed}; the server asks for a pause of {failed.asked_s:.0f} s",
                AGAIN_HINT,
            )
        _log.info("%s: %s; trying again", file, failed)
        if not self._retries.pause(failures, failed.asked_s):
            raise HubError(f"{file}: {failed}; not tried again: the reader was closed", AGAIN_HINT)

    @contextlib.contextmanager
    def _answer(self, file: RemoteFile, begin: int, end: int) -> Iterator[Any]:
        """Request a range, follow redirects, and yield the checked answer."""
        # A whole file is requested without a range: some caches for small files ignore ranges.
        whole = (begin, end) == (0, file.size)
        ranges = {"Accept-Encoding": "identity"} | (
            {} if whole else {"Range": f"bytes={begin}-{end - 1}"}
        )
        url = self._locations.get(file.url, file.url)
        for _ in range(MAX_REDIRECTS):
            home = _origin(url) == _origin(file.url)
            headers = self._headers | ranges if home else ranges
            with self._session().stream(
                "GET", url, headers=headers, follow_redirects=False, timeout=self._timeout_s
            ) as answer:
                if home:
                    _check_identity(answer, file)
                if answer.status_code not in (301, 302, 303, 307, 308):
                    self._check_status(answer, file, home, 200 if whole else 206)
                    _check_range(answer, file, begin, end)
                    yield answer
                    return
                target = urljoin(url, answer.headers.get("Location", ""))
            scheme = urlsplit(target).scheme
            if scheme not in ("http", "https") or (scheme == "http" and url.startswith("https:")):
                raise HubError(
                    f"{file}: redirected to an address of scheme {scheme!r}, which is not followed"
                )
            url = target
            if _origin(url) != _origin(file.url):
                self._locations[file.url] = url
        raise HubError(f"{file}: more than {MAX_REDIRECTS} redirects")

    def _check_status(self, answer: Any, file: RemoteFile, home: bool, expected: int) -> None:
        status = answer.status_code
        if status == expected:
            return
        if not home:
            # Signed addresses expire: the next attempt asks the Hub for a new one.
            self._locations.pop(file.url, None)
        if status in (408, 429) or status >= 500 or not home or status == 200:
            what = "status 200, the range was ignored" if status == 200 else f"status {status}"
            raise _Failed(what, _asked_pause(answer.headers))
        login = "give a token that may read it: hf auth login, or --token"
        hints = {
            401: login,
            403: f"accept the model's terms on its page, and {login}",
            404: "check the names of repository, revision and file",
        }
        raise HubError(
            f"{file}: status {status} {answer.headers.get('X-Error-Code', '')}".rstrip(),
            hints.get(status, ""),
        )


def _check_identity(answer: Any, file: RemoteFile) -> None:
    """Raise HubError if the file's own host states another commit, ETag or size than the known."""
    if answer.status_code >= 400:
        return
    # A redirect's own ETag is not the file's.
    own_etag = answer.headers.get("ETag") if answer.status_code in (200, 206) else None
    etag = answer.headers.get("X-Linked-Etag") or own_etag
    stated_and_known = {
        "commit": (answer.headers.get("X-Repo-Commit"), file.commit),
        "ETag": (etag.removeprefix("W/").strip('"') if etag else None, file.etag),
        "size": (answer.headers.get("X-Linked-Size"), str(file.size)),
    }
    for what, (stated, known) in stated_and_known.items():
        if stated is not None and stated != known:
            raise HubError(
                f"{file}: the Hub now states {what} {stated}, before it stated {known}",
                "the file was replaced, or the Hub is a faulty mirror: try again, or use another"
                " HF_ENDPOINT",
            )


def _check_range(answer: Any, file: RemoteFile, begin: int, end: int) -> None:
    headers = answer.headers
    expected = f"bytes {begin}-{end - 1}/{file.size}"
    if answer.status_code == 206 and (stated := headers.get("Content-Range")) != expected:
        raise _Failed(f"Content-Range {stated!r}, expected {expected!r}")
    if (length := headers.get("Content-Length")) not in (None, str(end - begin)):
        raise _Failed(f"Content-Length {length}, expected {end - begin}")
    if (encoding := headers.get("Content-Encoding", "identity")) != "identity":
        raise _Failed(f"Content-Encoding {encoding!r}, expected identity")


def _asked_pause(headers: Mapping[str, str]) -> float | None:
    """Return the pause that Retry-After or the Hub's RateLimit header asks for, in seconds.

    None without such a header, or for a date.
    """
    if re.fullmatch(r"\d{1,9}", after := headers.get("Retry-After", "").strip()):
        return float(after)
    limit = re.search(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d{1,9})", headers.get("RateLimit", ""))
    return float(limit[1]) if limit else None


def _origin(url: str) -> tuple[str, str | None, int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"https": 443}.get(parts.scheme, 80)
