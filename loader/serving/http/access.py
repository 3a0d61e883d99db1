"""Decides who may use a server: by API key, or by host name on the loopback interface."""

import hmac
import ipaddress
from urllib.parse import urlsplit


def is_loopback(host: str) -> bool:
    """True if `host` is a loopback name or address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Access:
    """Checks requests. key: the required API key, or None.

    Without a key the Host header must be a loopback name: a web page could otherwise reach the
    server through its own DNS name (DNS rebinding).
    """

    def __init__(self, key: str | None) -> None:
        self._key = key

    def refusal(self, authorization: str | None, host: str | None) -> str | None:
        """Return the reason to refuse a request with these headers, or None."""
        if self._key is None:
            name = urlsplit(f"//{host or ''}").hostname or ""
            return (
                None
                if is_loopback(name)
                else f"the host {name!r} is not this machine; start the server with an API key"
            )
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            given.strip().encode(), self._key.encode()
        ):
            return "the API key is missing or wrong; expected header: Authorization: Bearer KEY"
        return None
