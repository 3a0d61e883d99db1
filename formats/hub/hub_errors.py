"""Translation of errors of huggingface_hub and its HTTP client, and repetition of failed calls."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from formats.errors import HubError, MoeConvertError
from formats.files.io_errors import io_error
from formats.files.paths import similar_folders
from formats.hub.ranges import AGAIN_HINT, Retries

_LOGIN_HINT = "hf auth login, or --token"
_CONNECTION_HINT = f"check the network connection, and {AGAIN_HINT}"
_ONLINE_HINT = "go online: HF_HUB_OFFLINE is set"

T = TypeVar("T")


@dataclass(frozen=True)
class _Failure:
    """A translated error. asked_s: the pause that the server asks for, in seconds."""

    error: MoeConvertError
    is_temporary: bool = False
    asked_s: float | None = None


def hub_call(call: Callable[[], T], repo: str, retries: Retries) -> T:
    """Return the result of `call`, which uses huggingface_hub for the repository `repo`.

    Broken connections and status 408, 429 and 5xx are tried again. Raises HubError for the errors
    of huggingface_hub, without token and request, and OutputError or DoesNotFitError if the cache
    cannot be written; other exceptions pass.
    """
    for failures in range(1, retries.attempts + 1):
        # The error is raised outside of the except clause: its context would hold the request.
        try:
            return call()
        except Exception as e:
            failure = _translated(e, repo)
            if failure is None:
                raise
        if (
            not failure.is_temporary
            or failures == retries.attempts
            or (failure.asked_s or 0) > retries.longest_s
        ):
            raise failure.error
        retries.pause(failures, failure.asked_s)
    raise ValueError("no attempts")


def transport_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of broken connections and timeouts."""
    return (*client_errors("TransportError"), ConnectionError, TimeoutError)


def client_errors(name: str) -> tuple[type[Exception], ...]:
    """Return the HTTP client's exception class `name` in a tuple, empty for an unknown client.

    The client is httpx (huggingface_hub 1) or httpx2.
    """
    from huggingface_hub.utils import get_session

    for kind in type(get_session()).__mro__:
        module = importlib.import_module(kind.__module__.partition(".")[0])
        if error := getattr(module, name, None):
            return (error,)
    return ()


def _translated(error: Exception, repo: str) -> _Failure | None:
    """Translate an error of huggingface_hub; None for errors of other origin."""
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import LocalEntryNotFoundError

    if final := _final_error(error, repo):
        return _Failure(final)
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        after = error.response.headers.get("Retry-After", "")
        hint = f"check the token: {_LOGIN_HINT}" if status in (401, 403) else AGAIN_HINT
        return _Failure(
            HubError(f"repository {repo}: the Hub answered with status {status}", hint),
            is_temporary=status in (408, 429) or status >= 500,
            asked_s=float(after) if after.isdecimal() else None,
        )
    if isinstance(error, LocalEntryNotFoundError):
        if constants.is_offline_mode():
            return _Failure(
                HubError(
                    f"repository {repo} is not in the cache (nor is there a folder of that name),"
                    " and HF_HUB_OFFLINE is set",
                    _similar_hint(repo)
                    or f"go online, or download it on a machine that is online: hf download {repo}",
                )
            )
        return _Failure(
            HubError(
                f"repository {repo}: the Hub cannot be reached, and the cache lacks some files",
                AGAIN_HINT,
            ),
            is_temporary=True,
        )
    if (
        isinstance(error, OSError)
        and error.errno is not None
        and not isinstance(error, ConnectionError | TimeoutError)
    ):
        return _Failure(io_error(error, constants.HF_HUB_CACHE, "written", HubError))
    if isinstance(error, client_errors("InvalidURL") + client_errors("UnsupportedProtocol")):
        return _Failure(
            HubError(f"repository {repo}: invalid address: {error}", "check HF_ENDPOINT")
        )
    # huggingface_hub raises a plain OSError for a file of another size than announced.
    if isinstance(error, (*transport_errors(), OSError)):
        return _Failure(
            HubError(f"repository {repo}: {type(error).__name__}: {error}", _CONNECTION_HINT),
            is_temporary=True,
        )
    return None


def _final_error(error: Exception, repo: str) -> HubError | None:
    """Translate huggingface_hub's errors of access and names; None for others."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return HubError(
            f"repository {repo} is gated, and the token (if any) has no access",
            "accept the terms on its page on the Hub, and give a token that may read it:"
            f" {_LOGIN_HINT}",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(
            f"repository {repo} does not exist (nor a folder of that name)",
            _similar_hint(repo) or "check the name; a private one needs a token: hf auth login",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(
            f"repository {repo} has no such revision", "check --revision: a branch, tag or commit"
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubError(f"repository {repo} cannot be reached offline", _ONLINE_HINT)
    return None


def _similar_hint(repo: str) -> str:
    """Suggest folders with names similar to `repo`, which may be a mistyped path; else empty."""
    folders = similar_folders(Path(repo)) if Path(repo).parent.is_dir() else []
    return f"is the folder {' or '.join(folders)} meant?" if folders else ""
