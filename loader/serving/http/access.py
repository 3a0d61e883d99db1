"""Who may use a server: the key, the addresses it listens on, and the names by which it is called."""

import hmac
import ipaddress
from urllib.parse import urlsplit


def is_loopback(host: str) -> bool:
    """True if `host` is this machine alone, by name or address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Access:
    """Decides about requests. key: what they must bring, or None. Without a key only this machine's
    programs may ask, and no web page by a name of its own that leads here (DNS rebinding).
    """

    def __init__(self, key: str | None) -> None:
        self._key = key

    def refusal(self, authorization: str | None, host: str | None) -> str | None:
        """Return why a request with these headers is refused, or None."""
        if self._key is None:
            name = urlsplit(f"//{host or ''}").hostname or ""
            return (
                None
                if is_loopback(name)
                else f"the host {name!r} is not this machine; give the server an API key"
            )
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            given.strip().encode(), self._key.encode()
        ):
            return "the API key is missing or wrong: Authorization: Bearer KEY"
        return None
