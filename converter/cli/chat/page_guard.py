"""Protects the chat page: only this machine's browser may use it, and it loads nothing else."""

from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loader.serving.http.access import is_loopback

_HEADERS = {
    # An answer may contain an image of the internet; gradio needs inline scripts.
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' data: blob:;"
    " object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class PageGuard:
    """Middleware that refuses requests of other hosts and other web sites with status 403.

    A foreign Host header means DNS rebinding, a foreign Origin header another site's script. Each
    response forbids the browser to load anything from another address.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Implement ASGI."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        refusal = refusal_of(headers.get("host", ""), headers.get("origin"))
        app = PlainTextResponse(refusal, 403) if refusal else self._app
        await app(scope, receive, send_with_headers)


def refusal_of(host: str, origin: str | None) -> str | None:
    """Return the reason to refuse a request with these headers, or None."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        site = host if origin is None else urlsplit(origin).netloc
    except ValueError as e:
        return f"the header Host or Origin is not valid: {e}"
    if not is_loopback(name):
        return f"the host {name!r} is not this machine"
    return None if site == host else f"the site {origin!r} is not this page"
