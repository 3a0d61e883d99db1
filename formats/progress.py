"""The callback by which long operations report their progress."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total), in bytes unless the caller names another unit."""


def no_progress(stage: str, done: int, total: int) -> None:
    """Ignore the progress: the default where no callback is given."""
