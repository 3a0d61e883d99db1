"""A Hub on the loopback interface for huggingface_hub, and a second host that serves LFS files.

    with HubServer() as hub:
        # Files as bytes or paths, or a folder.
        commit = hub.add("me/model", {"config.json": b"{}", "model.safetensors": path})
        # Point this process to it: endpoint, cache, token "hf_me".
        hub.connect(tmp_path / "home", monkeypatch)
        # Or another process.
        subprocess.run(..., env=os.environ | hub.environ(tmp_path / "home"))
        # See tests/support/hub/hub_faults.py.
        hub.faults.drop("model.safetensors", after=1000)
        # Ask for the requests so far.
        hub.served("model.safetensors"), hub.ranges("model.safetensors"), hub.requests

The fixture `hub` (tests/conftest.py) is such a server, connected. On both hosts a file's URL path
contains its repository and its name: faults and counts find the file by name. LFS files
(.safetensors, or 1 MiB and more) are answered with a redirect to `hub.cdn`; `request.token` is true
if the request had a token. Other files are answered at once. `hub.commit` adds or replaces files of
a branch; `hub.files` returns a branch's files; `hub.bytes_per_s` limits the speed. It follows the
requests and answers of huggingface_hub 1 and 2. It does not implement Xet, pagination, multipart
uploads, datasets and spaces.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hub_api import answer_api, lookup
from hub_faults import Fault, Faults
from hub_repos import Blob, Commit, Repo

TOKEN = "hf_me"
"""The one token that the server knows: of user "me", who may do everything."""

_CHUNK = 1 << 20
_BURST_S = 0.05


@dataclass(frozen=True)
class Request:
    """A request that was answered. `begin`, `end`: the bytes of a file in the answer, -1 where it
    had none.
    """

    host: str
    method: str
    path: str
    token: bool
    status: int
    begin: int = -1
    end: int = -1


class HubServer:
    """Both hosts; a context manager."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        """Uploaded LFS objects by sha256, whether committed or not."""
        self.faults = Faults()
        self.requests: list[Request] = []
        self.bytes_per_s: float | None = None
        """Of all connections together."""
        self._line, self._line_free_s = threading.Lock(), 0.0
        self._servers = [_Server(("127.0.0.1", 0), self, name) for name in ("hub", "cdn")]
        # Two names: like the Hub's CDN, and unlike another port for huggingface_hub 1, the second
        # is another host.
        self.url, self.cdn = (
            f"http://{host}:{server.server_address[1]}"
            for host, server in zip(("127.0.0.1", "localhost"), self._servers, strict=True)
        )

    def __enter__(self) -> "HubServer":
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add(self, name: str, files: Path | Mapping[str, bytes | Path], **flags: bool) -> str:
        """Add a repository with these files (or those of a folder). Return its commit.

        flags: `private`, `gated`.
        """
        self.repos[name] = Repo(name, **flags)
        if isinstance(files, Path):
            files = {str(p.relative_to(files)): p for p in sorted(files.rglob("*")) if p.is_file()}
        return self.commit(name, files)

    def commit(self, name: str, files: Mapping[str, bytes | Path], ref: str = "main") -> str:
        """Add or replace files. Return the new commit."""
        repo = self.repos[name]
        head = repo.at(ref)
        old = head.files if head else {}
        return repo.commit(
            ref, old | {path: Blob.of(c, path) for path, c in files.items()}, "files"
        ).oid

    def head(self, name: str, ref: str = "main") -> Commit:
        """The commit at the head of a branch."""
        commit = self.repos[name].at(ref)
        assert commit
        return commit

    def files(self, name: str, ref: str = "main") -> dict[str, bytes]:
        """Return the files of a branch: path -> content."""
        return {path: blob.read(0, blob.size) for path, blob in self.head(name, ref).files.items()}

    def served(self, path: str = "") -> int:
        """Return the number of file bytes sent for URL paths that contain `path`."""
        return sum(end - begin for begin, end in self.ranges(path))

    def ranges(self, path: str = "") -> list[tuple[int, int]]:
        """Return the sent ranges of those files as (begin, end), in order."""
        return [(r.begin, r.end) for r in list(self.requests) if path in r.path and r.end > r.begin]

    def wait_for_line(self, n_bytes: int) -> None:
        """Wait until `n_bytes` have passed at `bytes_per_s`, after those of other connections."""
        if self.bytes_per_s:
            with self._line:
                # What was not used a moment ago is made up for: a client takes its time over each
                # piece.
                recently_s = time.monotonic() - _BURST_S
                self._line_free_s = max(self._line_free_s, recently_s) + n_bytes / self.bytes_per_s
                free_s = self._line_free_s
            time.sleep(max(0.0, free_s - time.monotonic()))

    def environ(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Return the environment variables of a process that uses this Hub."""
        with_token = {"HF_TOKEN": token} if token else {}
        return with_token | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def connect(self, home: Path, patch: pytest.MonkeyPatch, token: str | None = TOKEN) -> None:
        """Let this process use this Hub; huggingface_hub read its environment at import."""
        from huggingface_hub import constants, hf_api
        from huggingface_hub.utils import _http

        for name, value in self.environ(home, token).items():
            patch.setenv(name, value)
        if token is None:
            patch.delenv("HF_TOKEN", raising=False)
        patch.setattr(constants, "ENDPOINT", self.url)
        patch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            self.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        patch.setattr(constants, "HF_HOME", str(home))
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(hf_api.api, "endpoint", self.url)
        if hasattr(_http, "_HUB_ORIGINS"):  # from huggingface_hub 2 on
            patch.setattr(_http, "_HUB_ORIGINS", frozenset({_http._url_origin(self.url)}))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], hub: HubServer, name: str) -> None:
        super().__init__(address, _Handler)
        self.hub, self.name = hub, name

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a client that hangs up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def _answer(self) -> None:
        hub, path = self.server.hub, self.path.partition("?")[0]
        self._body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault := hub.faults.take("before", path):
            assert fault.action
            fault.action()
        if fault := hub.faults.take("status", path):
            self._send(fault.status, b"", fault.headers)
        elif self.server.name == "cdn":
            self._answer_cdn(path)
        elif "/resolve/" in path:
            self._answer_resolve(path)
        else:
            reply = answer_api(hub, self.command, self.path, self._body, self._may())
            self._send(reply.status, reply.body, reply.headers)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _answer_resolve(self, path: str) -> None:
        name, _, rest = path[1:].partition("/resolve/")
        found = lookup(self.server.hub, name, rest, self._may(), content=True)
        if isinstance(found, tuple):
            commit, file, blob = found
        else:
            self._send(found.status, found.body, found.headers)
            return
        hub = self.server.hub
        etag = "0" * 64 if hub.faults.take("etag", path) else blob.etag
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if blob.lfs:
            location = f"{hub.cdn}/{name}/{commit.oid}/{file}?oid={blob.sha256}&X-Signature=secret"
            linked = {
                "Location": location,
                "X-Linked-Etag": f'"{etag}"',
                "X-Linked-Size": str(blob.size),
            }
            self._send(302, b"", headers | linked | {"ETag": f'"{blob.git_oid}"'})
        else:
            self._send_file(blob, headers | {"ETag": f'"{etag}"'})

    def _answer_cdn(self, path: str) -> None:
        hub = self.server.hub
        query = dict(
            item.split("=", 1) for item in self.path.partition("?")[2].split("&") if "=" in item
        )
        if query.get("X-Signature") != "secret":
            self._send(403, b"no signature")
        elif self.command == "PUT":
            hub.objects[path.rpartition("/")[2]] = self._body
            self._send(200, b"", {"ETag": '"uploaded"'})
        else:
            owner, model, oid, file = path[1:].split("/", 3)
            blob = hub.repos[f"{owner}/{model}"].commits[oid].files[file]
            self._send_file(blob, {"ETag": f'"{blob.sha256}"', "Accept-Ranges": "bytes"})

    def _send_file(self, blob: Blob, headers: dict[str, str]) -> None:
        faults, path = self.server.hub.faults, self.path.partition("?")[0]
        with_body = self.command == "GET"
        asked = self.headers.get("Range") if with_body else None
        if asked and faults.take("ignore_range", path):
            asked = None
        begin, end, status = 0, blob.size, 200
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin = int(first) if first else max(0, blob.size - int(last))
            end = min(blob.size, int(last) + 1) if first and last else blob.size
            if begin >= end:
                self._send(416, b"", {"Content-Range": f"bytes */{blob.size}"})
                return
            if shift := faults.take("shift", path):
                begin, end = begin + shift.number, min(blob.size, end + shift.number)
            status, headers = (
                206,
                headers | {"Content-Range": f"bytes {begin}-{end - 1}/{blob.size}"},
            )
        short = faults.take("short", path) if with_body else None
        end -= short.number if short else 0
        drop = faults.take("drop", path) if with_body else None
        stop = min(end, begin + drop.number) if drop else end
        # Recorded first: a client that has read everything may look at once.
        self._record(status, begin, stop if with_body else begin)
        self._head(status, end - begin, headers)
        if with_body:
            self._send_bytes(blob, begin, stop, path)
        self.close_connection = self.close_connection or drop is not None

    def _send_bytes(self, blob: Blob, begin: int, end: int, path: str) -> None:
        hub = self.server.hub
        damage = hub.faults.take("damage", path)
        for position in range(begin, end, _CHUNK):
            data = blob.read(position, min(position + _CHUNK, end))
            hub.wait_for_line(len(data))
            self.wfile.write(_damaged(data, damage, position - begin))

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self._record(status, -1, -1)
        self._head(status, len(body), headers or {})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def _record(self, status: int, begin: int, end: int) -> None:
        path, token = self.path.partition("?")[0], "Authorization" in self.headers
        self.server.hub.requests.append(
            Request(self.server.name, self.command, path, token, status, begin, end)
        )

    def _may(self) -> bool | None:
        """True if the token is right; None without a token."""
        token = self.headers.get("Authorization")
        return None if token is None else token == f"Bearer {TOKEN}"

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def _damaged(data: bytes, damage: Fault | None, position: int) -> bytes:
    at = damage.number - position if damage else -1
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] if 0 <= at < len(data) else data
