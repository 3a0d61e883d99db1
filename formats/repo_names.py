"""Names of repositories, and the addresses from which people copy them."""

import re

from formats.errors import HubError

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_ADDRESS = re.compile(
    r"(?:(?:https?:/+)?(?:www\.)?(?:huggingface\.co|hf\.co)/|https?:/+[^/]+/|hf:/+)"
    r"([^/]+/[^/?#]+)(?:[/?#].*)?"
)
_MAX_LENGTH = 96
_HUB = "https://huggingface.co"


def is_repo_name(text: str) -> bool:
    """True if `text` has the form owner/model."""
    return (
        len(text) <= _MAX_LENGTH
        and _REPO.fullmatch(text) is not None
        and "--" not in text
        and ".." not in text
    )


def check_repo_name(text: str) -> None:
    """Raise HubError unless `text` has the form owner/model."""
    if not is_repo_name(text):
        raise HubError(f"{text!r} is not the name of a repository", "name it as owner/model")


def page_address(repo: str) -> str:
    """Return the address of a repository's page on the Hub."""
    return f"{_HUB}/{repo}"


def repo_of_address(text: str) -> str | None:
    """Return owner/model from the address of a repository or of a page in it, else None.

    `https:/` counts as `https://`, because a Path keeps one slash only.
    """
    match = _ADDRESS.fullmatch(text)
    repo = match[1].removesuffix(".git") if match else ""
    return repo if is_repo_name(repo) else None
