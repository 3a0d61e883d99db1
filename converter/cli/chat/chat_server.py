"""An OpenAI-compatible server, as `moe-convert chat --url` uses it."""

import json
from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx

from formats.errors import MoeConvertError
from loader.serving.conversation import ContextFullError
from loader.serving.http.access import is_loopback

_CONNECT_S = 10.0
_LONGEST_ERROR = 500


class ServerError(MoeConvertError):
    """A server that cannot be reached, or that refuses a request."""


class ChatServer:
    """Client of the server at `url`, with or without /v1 at its end. key: API key, or None."""

    def __init__(self, url: str, key: str | None = None) -> None:
        url = url.rstrip("/")
        self.url = url if url.endswith("/v1") else f"{url}/v1"
        self._options: dict[str, Any] = {
            "headers": {"Authorization": f"Bearer {key}"} if key else {},
            # An answer's first token may take minutes.
            "timeout": httpx.Timeout(None, connect=_CONNECT_S),
            # A proxy of the environment cannot reach this machine's loopback interface.
            "trust_env": not is_loopback(_host_of(url)),
        }
        self._client = httpx.Client(**self._options)

    def models(self) -> list[dict[str, Any]]:
        """Return the entries of /v1/models. ServerError."""
        with self._response("GET", "/models") as response:
            found = _parsed(response.read())
        data = found.get("data")
        if not isinstance(data, list) or not all(isinstance(m, dict) and "id" in m for m in data):
            raise self._error("the answer to /v1/models is not a list of models")
        return data

    def stream(self, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """Yield the chunks of a streamed chat completion. ServerError, ContextFullError.

        Closing the iterator ends the connection, and with it the generation.
        """
        with self._response("POST", "/chat/completions", body) as response:
            for line in response.iter_lines():
                if _is_end(line):
                    return
                if chunk := self._chunk(line):
                    yield chunk

    async def stream_async(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Yield what `stream` yields. Cancelling the task ends the connection at once, also while
        the server computes the prompt.
        """
        address = f"{self.url}/chat/completions"
        with self._named_errors():
            async with (
                httpx.AsyncClient(**self._options) as client,
                client.stream("POST", address, json=body) as response,
            ):
                if response.status_code != 200:
                    raise self._refusal(response, await response.aread())
                async for line in response.aiter_lines():
                    if _is_end(line):
                        return
                    if chunk := self._chunk(line):
                        yield chunk

    def _chunk(self, line: str) -> dict[str, Any] | None:
        """Return the chunk in a line of the stream, if any. ServerError if it is an error."""
        if not line.startswith("data:"):
            return None
        chunk = _parsed(line.removeprefix("data:").strip())
        if "error" in chunk:
            raise self._error(_message(chunk))
        return chunk

    @contextmanager
    def _response(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> Iterator[httpx.Response]:
        with (
            self._named_errors(),
            self._client.stream(method, self.url + path, json=body) as response,
        ):
            if response.status_code != 200:
                raise self._refusal(response, response.read())
            yield response

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Turn errors of httpx into ServerError."""
        try:
            yield
        except httpx.ConnectError as e:
            raise self._error(f"cannot connect: {e}", "moe-convert serve PATH starts one") from None
        except (httpx.HTTPError, httpx.InvalidURL) as e:
            raise self._error(str(e) or type(e).__name__, "check the address") from None

    def _refusal(self, response: httpx.Response, data: bytes) -> MoeConvertError:
        """Return the error for a response whose status is not 200."""
        found = _parsed(data)
        message = _message(found) or response.reason_phrase
        if _code(found) == "context_length_exceeded":
            return ContextFullError(message)
        hint = {
            401: "set MOE_CONVERT_API_KEY, or give --api-key-file FILE",
            404: "check the address and --model",
            429: "try again later",
        }.get(response.status_code, "")
        return self._error(f"status {response.status_code}: {message}", hint)

    def _error(self, message: str, hint: str = "") -> ServerError:
        return ServerError(f"{self.url}: {message}", hint)


def _is_end(line: str) -> bool:
    return line.removeprefix("data:").strip() == "[DONE]"


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _parsed(data: bytes | str) -> dict[str, Any]:
    """Return the JSON object in `data`; an empty one if it is something else."""
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _message(found: dict[str, Any]) -> str:
    error = found.get("error")
    text = error.get("message") if isinstance(error, dict) else error
    return str(text or "")[:_LONGEST_ERROR]


def _code(found: dict[str, Any]) -> Any:
    error = found.get("error")
    return error.get("code") if isinstance(error, dict) else None
