"""Access to private attributes of product objects, for facts that no public call reports."""

from typing import Any


def inside(thing: Any, name: str) -> Any:
    """Return the attribute `_name`.

    Threads, pending jobs, free buffers and page-locked memory are no part of the interface, but
    they must be right after errors, interrupts and forks. Looks inside stand here only, so that one
    search finds all tests that depend on them.
    """
    return getattr(thing, f"_{name}")


def retry_quickly(repo: Any, retries: Any) -> None:
    """Replace the retries of a HubRepo that the product opened: the real ones wait seconds."""
    object.__setattr__(repo, "_retries", retries)
    repo._reader._retries = retries
