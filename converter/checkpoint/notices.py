"""Log lines about a source, each once in a process: a command opens the same source more than once."""

import functools
import logging

_log = logging.getLogger(__name__)


@functools.cache
def notice(text: str) -> None:
    """Logs `text` as a warning, the first time."""
    _log.warning("%s", text)
