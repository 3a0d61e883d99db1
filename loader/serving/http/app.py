"""The routes: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Depends, FastAPI, HTTPException
from fastapi import Request as HttpRequest
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from loader.serving.answers.request import RefusedError
from loader.serving.engine import ClosedError, Engine, QueueFullError
from loader.serving.http.access import Access
from loader.serving.http.answer_json import ChatJson, CompletionJson, error_json
from loader.serving.http.bodies import LARGEST_BODY_BYTES, ChatBody, CompletionBody, parse_body
from loader.serving.http.exchange import CLIENT_GONE, Exchange
from loader.serving.http.request_maker import RequestMaker

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AppOptions:
    """Options of the application.

    model_name: name for clients. key: required API key, or None. cors: origins of web pages that
    may send requests. template: text of a chat template that replaces the tokenizer's.
    """

    model_name: str
    key: str | None = None
    cors: Sequence[str] = ()
    template: str | None = None


def build_app(engine: Engine, tokenizer: Any, options: AppOptions) -> FastAPI:
    """Return the application that serves `engine`."""
    app = FastAPI(title="moe-convert", docs_url=None, redoc_url=None, openapi_url=None)
    access = Access(options.key)
    routes = _Routes(engine, RequestMaker(engine, tokenizer, options.template), options.model_name)

    def check_access(http: HttpRequest) -> None:
        if refusal := access.refusal(http.headers.get("authorization"), http.headers.get("host")):
            raise HTTPException(401, refusal, {"WWW-Authenticate": "Bearer"})

    checked = [Depends(check_access)]
    app.get("/health")(routes.health)
    app.get("/metrics", dependencies=checked)(routes.metrics)
    app.get("/v1/models", dependencies=checked)(routes.models)
    app.get("/v1/models/{name:path}", dependencies=checked)(routes.one_model)
    app.post("/v1/chat/completions", dependencies=checked)(routes.chat)
    app.post("/v1/completions", dependencies=checked)(routes.completions)
    for error, handler in _HANDLERS.items():
        app.exception_handler(error)(handler)
    app.add_middleware(_Counted, engine=engine)
    if options.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.cors),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    return app


class _Routes:
    def __init__(self, engine: Engine, maker: RequestMaker, model_name: str) -> None:
        self._engine = engine
        self._maker = maker
        self._name = model_name
        self._created = int(time.time())

    async def health(self) -> dict[str, str]:
        return {"status": "ok"}

    async def metrics(self) -> Response:
        return PlainTextResponse(
            self._engine.metrics_text(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._model()]}

    async def one_model(self, name: str) -> dict[str, Any]:
        self._check_model(name)
        return self._model()

    async def chat(self, http: HttpRequest) -> Response:
        body = parse_body(await _json_of(http), ChatBody)
        self._check_model(body.model)
        _log.debug("chat of %d messages, user %r", len(body.messages), body.user)
        request = await asyncio.to_thread(self._maker.of_chat, body)
        tools = None if body.tool_choice == "none" or not body.tools else body.tools
        names = tools and frozenset(str(tool["function"]["name"]) for tool in tools)
        form = ChatJson(self._name, self._engine.vocabulary)
        return await _response(Exchange(self._engine, request, form, names or None), http, body)

    async def completions(self, http: HttpRequest) -> Response:
        body = parse_body(await _json_of(http), CompletionBody)
        self._check_model(body.model)
        _log.debug("completion, user %r", body.user)
        request = await asyncio.to_thread(self._maker.of_completion, body)
        form = CompletionJson(self._name, self._engine.vocabulary)
        return await _response(Exchange(self._engine, request, form), http, body)

    def _model(self) -> dict[str, Any]:
        return {
            "id": self._name,
            "object": "model",
            "created": self._created,
            "owned_by": "moe-convert",
            "max_model_len": self._engine.limits.max_context,
        }

    def _check_model(self, name: str) -> None:
        if name != self._name:
            raise HTTPException(404, f"model {name!r} is not served here; {self._name!r} is")


class _Stream(StreamingResponse):
    """A streamed response. Its generation is cancelled when it ends, for whatever reason."""

    def __init__(self, exchange: Exchange, *, includes_usage: bool) -> None:
        # A proxy that buffers the response would defeat streaming.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(
            exchange.stream(includes_usage=includes_usage),
            headers=headers,
            media_type="text/event-stream",
        )
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(self._exchange.cancel_when_gone(receive))
        try:
            await super().__call__(scope, receive, send)
        finally:
            watch.cancel()
            self._exchange.cancel()


async def _response(
    exchange: Exchange, http: HttpRequest, body: ChatBody | CompletionBody
) -> Response:
    if body.stream:
        return _Stream(exchange, includes_usage=body.includes_usage)
    watch = asyncio.create_task(exchange.cancel_when_gone(http.receive))
    try:
        status, answer = await exchange.whole()
    finally:
        watch.cancel()
        exchange.cancel()
    return JSONResponse(answer, status)


async def _json_of(http: HttpRequest) -> bytes:
    """Return the body of a request. 415 unless it is JSON: browsers send other types across
    origins without a preflight request. 413 if it is too large.
    """
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "expected Content-Type: application/json")
    data = bytearray()
    async for part in http.stream():
        data += part
        if len(data) > LARGEST_BODY_BYTES:
            raise HTTPException(413, f"the request is larger than {LARGEST_BODY_BYTES} bytes")
    return bytes(data)


class _Counted:
    """Middleware that counts responses by route and status."""

    def __init__(self, app: ASGIApp, engine: Engine) -> None:
        self._app = app
        self._engine = engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                self._engine.metrics.count_response(
                    getattr(route, "path", "other"), message["status"]
                )
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)


async def _http_error(_http: HttpRequest, error: StarletteHTTPException) -> JSONResponse:
    kind = "authentication_error" if error.status_code == 401 else "invalid_request_error"
    code = {401: "invalid_api_key", 404: "not_found"}.get(error.status_code)
    return JSONResponse(
        error_json(str(error.detail), kind, code=code), error.status_code, error.headers
    )


async def _refused(_http: HttpRequest, error: RefusedError) -> JSONResponse:
    return JSONResponse(
        error_json(error.message, "invalid_request_error", error.parameter, error.code), 400
    )


async def _queue_full(_http: HttpRequest, error: QueueFullError) -> JSONResponse:
    headers = {"Retry-After": str(error.retry_after_s)}
    return JSONResponse(
        error_json(error.message, "rate_limit_error", code="queue_full"), 429, headers
    )


async def _closed(_http: HttpRequest, error: ClosedError) -> JSONResponse:
    return JSONResponse(error_json(error.message, "server_error", code="shutting_down"), 503)


async def _gone(_http: HttpRequest, _error: ClientDisconnect) -> Response:
    """Respond to a client that disconnected before its request was read."""
    return Response(status_code=CLIENT_GONE)


_HANDLERS: dict[type[Exception], Callable[..., Any]] = {
    StarletteHTTPException: _http_error,
    RefusedError: _refused,
    QueueFullError: _queue_full,
    ClosedError: _closed,
    ClientDisconnect: _gone,
}
