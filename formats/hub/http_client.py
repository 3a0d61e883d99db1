"""HTTP client for byte ranges, from huggingface_hub's factory, but not its shared client.

Background threads read ranges while the program runs. huggingface_hub closes its shared client in
each forked child. The child then waits forever for the client's lock if one of these threads held
it at the fork: 8 of 1000 forks beside two reading threads. Nothing closes this client in a child.
"""

import os
from typing import Any

_clients: dict[tuple[int, Any], Any] = {}
"""Client by (process id, factory). The parent's client stays in a forked child, unused: its
connections belong to the parent.
"""


def range_client() -> Any:
    """Return this process's client for byte ranges, safe to use from several threads.

    A factory that the program gave to `huggingface_hub.set_client_factory` makes it, so proxies and
    certificates are the same.
    """
    factory = client_factory()
    key = os.getpid(), factory
    if (client := _clients.get(key)) is None:
        # No lock: a forked child could find it locked. The slower of two threads drops its client.
        client = _clients.setdefault(key, factory())
    return client


def client_factory() -> Any:
    """Return the factory of huggingface_hub's HTTP clients.

    huggingface_hub has a public function to set it and none to get it.
    """
    from huggingface_hub.utils import _http

    return _http._GLOBAL_CLIENT_FACTORY
