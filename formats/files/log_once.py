"""Warnings that are said once a process, however often a folder is opened."""

import logging
from functools import lru_cache

_log = logging.getLogger(__name__)


@lru_cache(1024)
def warn_once(message: str) -> None:
    """Logs `message` as a warning, unless this process did so before."""
    _log.warning("%s", message)
