"""Publishing: a converted folder becomes one commit of a Hub repository, so that nobody sees half
of a model.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converter.publish.model_card import CARD_NAME, MARK, CardOptions, card_text
from formats import EXPERTS_FOLDER, INDEX_NAME
from formats.artifact import Artifact
from formats.errors import HubError, MoeConvertError
from formats.files.paths import locate, read_small
from formats.hub.ranges import RemoteFile, Retries
from formats.hub.repo import HubRepo, hub_call, is_repo_name
from formats.index import Index
from formats.quality import QUALITY_NAME, read_quality

_TOKEN_HINT = "give one that may write with --token, or log in: hf auth login"
LICENSE_FILE = re.compile(r"LICEN[SC]E([.\-_].*)?", re.IGNORECASE)


@dataclass(frozen=True)
class PublishOptions:
    """Where and how. license: an identifier of the Hub's, such as apache-2.0; None where the folder
    has the file.
    """

    repo: str
    private: bool = False
    create_pr: bool = False
    revision: str | None = None
    license: str | None = None
    base_model: str | None = None
    token: str | None = None
    retries: Retries = field(default_factory=Retries)


@dataclass(frozen=True)
class Publication:
    """What an upload sends, in bytes by file name, and what is on the Hub already; files that go
    are `deleted`.
    """

    sent: dict[str, int]
    unchanged: list[str]
    deleted: list[str]
    commit: str | None = None
    url: str | None = None
    """Of the commit or the pull request; None of a dry run, and where nothing was to be sent."""


def check_license(names: list[str], license_id: str | None, where: Path | str) -> str | None:
    """The licence file among `names`; MoeConvertError if there is none and no `license_id`."""
    found = next((name for name in sorted(names) if LICENSE_FILE.fullmatch(name)), None)
    if found is None and license_id is None:
        raise MoeConvertError(
            f"{where}: the source's licence file is missing",
            "name its licence with --license, such as apache-2.0",
        )
    return found


def make_card(artifact: Artifact, options: PublishOptions) -> str:
    """The card to publish: the folder's own if somebody wrote one, else a new one."""
    path = artifact.folder / CARD_NAME
    # Through the same check as every other file: a link out of the folder must not be published.
    own = (
        _text(read_small(artifact.folder, CARD_NAME, str(artifact.folder)), path)
        if os.path.lexists(path)
        else MARK
    )
    if MARK not in own:
        return own
    file = check_license([f.file for f in artifact.index.files], options.license, artifact.folder)
    chosen = options.license or _license_of(locate(artifact.folder, file or "", "licence"))
    card = CardOptions(options.repo, chosen, file, options.base_model)
    return card_text(artifact.index, read_quality(artifact.folder), card)


def check_target(options: PublishOptions) -> None:
    """HubError if the Hub would refuse a publication of whatever folder: by name, token, or the
    files that are there.

    Changes nothing there.
    """
    _check_access(options)
    _refuse_loaded(_state(options, create=False)[1], options.repo)


def check_publication(folder: Path, options: PublishOptions) -> None:
    """Raises before the folder's bytes are read and sent what `publish_folder` would raise after
    that; sends nothing.

    Licence, card with its metadata as the Hub sees them, and what `check_target` checks.
    """
    artifact = Artifact.open(folder)
    check_license([f.file for f in artifact.index.files], options.license, folder)
    check_target(options)
    _validate(make_card(artifact, options), options)


def _text(data: bytes, path: Path) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        raise MoeConvertError(
            f"{path}: not UTF-8 at byte {e.start}", "save the card as UTF-8"
        ) from None


def publish_folder(
    folder: Path, options: PublishOptions, *, dry_run: bool = False, bars: bool = False
) -> Publication:
    """Uploads the folder, which was verified before, in one commit; files that are there already
    are not sent again.

    bars: whether huggingface_hub draws its progress. Raises HubError, MoeConvertError, and what
    Artifact.open raises.
    """
    check_repo_name(options.repo)
    artifact = Artifact.open(folder)
    check_license([f.file for f in artifact.index.files], options.license, folder)
    card = make_card(artifact, options).encode()
    _validate(card.decode(), options)
    contents: dict[str, Path | bytes] = {CARD_NAME: card}
    index = artifact.index
    names = [
        INDEX_NAME,
        index.trunk.file,
        *(f.file for f in index.layers),
        *(f.file for f in index.files),
    ]
    names += [QUALITY_NAME] if os.path.lexists(folder / QUALITY_NAME) else []
    contents |= {name: locate(folder, name, str(folder)) for name in names if name != CARD_NAME}
    parent, there = _state(options, create=not dry_run)
    _refuse_loaded(there, options.repo)
    sent = {
        name: c
        for name, c in sorted(contents.items())
        if name not in there or not _is_same(c, there[name])
    }
    deleted = [
        name for name in there if name.startswith(f"{EXPERTS_FOLDER}/") and name not in contents
    ]
    sizes = {name: len(c) if isinstance(c, bytes) else c.stat().st_size for name, c in sent.items()}
    plan = Publication(sizes, sorted(contents.keys() - sent.keys()), deleted)
    if dry_run or not (sent or deleted):
        return plan
    info = _commit(sent, deleted, parent, artifact, options, bars)
    return Publication(
        plan.sent, plan.unchanged, deleted, str(info.oid), str(info.pr_url or info.commit_url)
    )


def check_repo_name(repo: str) -> None:
    """HubError unless `repo` has the form owner/model."""
    if not is_repo_name(repo):
        raise HubError(f"{repo!r} is not the name of a repository", "name it as owner/model")


def _check_access(options: PublishOptions) -> None:
    """HubError unless there is a token that may write to the repository."""
    from huggingface_hub import get_token

    check_repo_name(options.repo)
    if options.token is None and get_token() is None:
        raise HubError(f"repository {options.repo}: there is no token that may write", _TOKEN_HINT)
    user: dict[str, Any] = _call(lambda: _api(options).whoami(), options)
    name, role = user.get("name"), user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise HubError(f"repository {options.repo}: the token of {name} may only read", _TOKEN_HINT)
    owner = options.repo.partition("/")[0]
    if not options.create_pr and owner not in {
        name,
        *(org.get("name") for org in user.get("orgs", [])),
    }:
        raise HubError(
            f"repository {options.repo}: the token is of {name}, who is no member of {owner}",
            "choose another OWNER/MODEL, or give the owner's token with --token",
        )


def _refuse_loaded(there: Iterable[str], repo: str) -> None:
    if loaded := [
        name
        for name in there
        if re.fullmatch(r"(pytorch_)?model[^/]*\.(safetensors|bin)(\..*)?", name)
    ]:
        raise HubError(
            f"repository {repo} has {loaded[0]}, which transformers would load instead",
            "delete it there, or choose another repository",
        )


def _state(options: PublishOptions, *, create: bool) -> tuple[str | None, dict[str, RemoteFile]]:
    """Commit and files of the branch that is written to, made if need be; (None, {}) where it is
    not there.
    """
    api, repo, branch = _api(options), options.repo, options.revision
    if create:
        _call(lambda: api.create_repo(repo, private=options.private, exist_ok=True), options)
        if branch and not options.create_pr:
            _call(lambda: api.create_branch(repo, branch=branch, exist_ok=True), options)
    elif not _call(lambda: api.repo_exists(repo), options):
        return None, {}
    elif branch and not _call(lambda: api.revision_exists(repo, branch), options):
        branch = None
    at = HubRepo.open(repo, branch, options.token, options.retries)
    return at.commit, at.files


def _commit(
    contents: dict[str, Path | bytes],
    deleted: list[str],
    parent: str | None,
    artifact: Artifact,
    options: PublishOptions,
    bars: bool,
) -> Any:
    """One commit, after all files are there; upload_folder makes several where hf_xet is installed."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    quiet = bars or are_progress_bars_disabled()
    if not quiet:
        disable_progress_bars()
    try:
        # Not made again for a new attempt: they know which files have been sent.
        operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
        operations += [CommitOperationDelete(name) for name in deleted]
        return _call(
            lambda: _api(options).create_commit(
                options.repo,
                operations,
                commit_message=_message(artifact.index),
                revision=options.revision,
                create_pr=options.create_pr,
                parent_commit=parent,
            ),
            options,
        )
    finally:
        if not quiet:
            enable_progress_bars()


def _message(index: Index) -> str:
    """The commit's message. Of a stranger's names it has what has no meaning in Markdown."""
    source, recipe = (
        re.sub(r"[^\w./+ -]", "_", name) for name in (index.source.name, index.recipe.name)
    )
    return f"{source}, {recipe}, by moe-convert"


def _validate(card: str, options: PublishOptions) -> None:
    """MoeConvertError if the Hub does not take the card's metadata."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session, hf_raise_for_status

    def ask() -> list[str]:
        # ModelCard.validate asks about the metadata as it reads them, not as they stand there.
        wish = {"content": card, "repoType": "model"}
        answer = get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json=wish)
        if answer.status_code == 400:
            return [str(e.get("message")) for e in answer.json().get("errors", [])] or [
                "no reason given"
            ]
        hf_raise_for_status(answer)
        return []

    if problems := _call(ask, options):
        raise MoeConvertError(
            f"{CARD_NAME}: the Hub refuses its metadata: {'; '.join(problems)}", "correct the card"
        )


def _is_same(content: Path | bytes, there: RemoteFile) -> bool:
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    if size != there.size:
        return False
    hasher = there.hasher()
    if isinstance(content, bytes):
        hasher.update(content)
    else:
        with open(content, "rb") as f:
            hashlib.file_digest(f, lambda: hasher)
    return bool(hasher.hexdigest() == there.etag)


def _license_of(path: Path) -> str:
    """The Hub's identifier of a licence text: apache-2.0, mit, or other."""
    text = " ".join(path.read_text(errors="replace")[:2000].split())
    if "Apache License Version 2.0" in text:
        return "apache-2.0"
    return "mit" if text.startswith("MIT License") else "other"


def _api(options: PublishOptions) -> Any:
    from huggingface_hub import HfApi

    return HfApi(token=options.token, library_name="moe-convert")


def _call(call: Callable[[], Any], options: PublishOptions) -> Any:
    return hub_call(call, options.repo, options.retries)
