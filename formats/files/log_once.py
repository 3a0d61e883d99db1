"""Log messages that appear once per process, however often a folder is opened."""

import logging
from functools import lru_cache

_log = logging.getLogger(__name__)


@lru_cache(1024)
def warn_once(message: str) -> None:
    """Log `message` as a warning, unless this process already did."""
    _log.warning("%s", message)


@lru_cache(1024)
def info_once(message: str) -> None:
    """Log `message` at level info, unless this process already did."""
    _log.info("%s", message)
