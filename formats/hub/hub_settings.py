"""Settings of huggingface_hub: its cache, its folder, offline mode, progress bars."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KERNELS_FOLDER = "gpu-kernels"
"""Folder of compiled GPU kernels in `kept_root`."""


def is_offline() -> bool:
    """True if huggingface_hub must not use the network (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return bool(constants.is_offline_mode())


def kept_root() -> Path:
    """Return our folder beside huggingface_hub's cache: HF_HOME/moe-convert.

    It holds lazily loaded models and compiled GPU kernels.
    """
    from huggingface_hub import constants

    return Path(constants.HF_HOME, "moe-convert")


def cache_root() -> Path:
    """Return the folder of huggingface_hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Hide huggingface_hub's progress bars in this context unless `shown`."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    hide = not shown and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()
