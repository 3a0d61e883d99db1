"""Publishes a converted folder as one commit, so that nobody ever sees half a model."""

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from converter.publish.folder_card import CardOptions, make_card
from converter.publish.model_card import CARD_NAME
from formats import EXPERTS_FOLDER, INDEX_NAME
from formats.artifact import Artifact
from formats.errors import HubError, MoeConvertError
from formats.files.paths import locate
from formats.hub.ranges import RemoteFile, Retries
from formats.hub.repo_writer import BranchState, RepoWriter
from formats.index import Index
from formats.quality import QUALITY_NAME
from formats.repo_names import check_repo_name

_TRANSFORMERS_WEIGHTS = re.compile(r"(pytorch_)?model[^/]*\.(safetensors|bin)(\..*)?")


@dataclass(frozen=True)
class PublishOptions:
    """The repository and the settings of an upload.

    revision: the branch, None for main. license: one of the Hub's identifiers, such as apache-2.0;
    None to use the folder's licence file. base_model: None for the index's source.
    """

    repo: str
    private: bool = False
    create_pr: bool = False
    revision: str | None = None
    license: str | None = None
    base_model: str | None = None
    token: str | None = None
    retries: Retries = field(default_factory=Retries)

    @property
    def writer(self) -> RepoWriter:
        """The writer of the branch."""
        return RepoWriter(
            self.repo, self.revision, self.token, self.private, self.create_pr, self.retries
        )


@dataclass(frozen=True)
class Publication:
    """The result of an upload, or of its dry run.

    sent: file name -> bytes. unchanged: files that the Hub had already. deleted: files that the
    commit removes. url: the page of the commit or pull request; None if nothing was sent.
    """

    sent: dict[str, int]
    unchanged: list[str]
    deleted: list[str]
    commit: str | None = None
    url: str | None = None


def check_target(options: PublishOptions) -> BranchState:
    """Return the state of the branch. Changes nothing on the Hub.

    Raises HubError if the Hub would refuse any upload: bad name, token or files in the way.
    """
    writer = options.writer
    writer.check_access()
    branch = writer.state()
    _refuse_weights(branch.files, options.repo)
    return branch


def check_publication(folder: Path, options: PublishOptions) -> None:
    """Raise what `publish_folder` would raise, before its minutes of reading and sending.

    Checks the licence, the card, the metadata on the Hub, and the target as `check_target` does.
    """
    artifact = Artifact.open(folder)
    branch = check_target(options)
    _check_card(_card(artifact, options, branch), options)


def publish_folder(
    folder: Path, options: PublishOptions, *, dry_run: bool = False, bars: bool = False
) -> Publication:
    """Upload a verified folder in one commit; files that the Hub has already are not sent again.

    bars: let huggingface_hub draw its progress. Raises HubError, MoeConvertError, and what
    Artifact.open raises.
    """
    check_repo_name(options.repo)
    artifact = Artifact.open(folder)
    writer = options.writer
    card = _card(artifact, options, writer.state())
    _check_card(card, options)
    contents = _contents(artifact, card)
    branch = writer.state() if dry_run else writer.create()
    _refuse_weights(branch.files, options.repo)
    sent = {
        name: content
        for name, content in contents.items()
        if name not in branch.files or not _is_same(content, branch.files[name])
    }
    unchanged = sorted(contents.keys() - sent.keys())
    experts = f"{EXPERTS_FOLDER}/"
    deleted = [name for name in branch.files if name.startswith(experts) and name not in contents]
    sizes = {name: _size_bytes(content) for name, content in sent.items()}
    if dry_run or not (sent or deleted):
        return Publication(sizes, unchanged, deleted)
    commit = writer.commit(_message(artifact.index), sent, deleted, branch.commit, bars=bars)
    return Publication(sizes, unchanged, deleted, commit.commit_id, commit.url)


def _card(artifact: Artifact, options: PublishOptions, branch: BranchState) -> str:
    revision = None if options.revision == "main" else options.revision
    return make_card(
        artifact,
        CardOptions(
            options.repo, revision, options.license, options.base_model, branch.read(CARD_NAME)
        ),
    )


def _check_card(card: str, options: PublishOptions) -> None:
    """Raise MoeConvertError if the Hub refuses the card's metadata."""
    if problems := options.writer.card_problems(card):
        raise MoeConvertError(
            f"{CARD_NAME}: the Hub refuses its metadata: {'; '.join(problems)}", "correct the card"
        )


def _contents(artifact: Artifact, card: str) -> dict[str, Path | bytes]:
    """Return the content of every file to publish, by name, ascending."""
    folder = artifact.folder
    index = artifact.index
    names = {
        INDEX_NAME,
        index.trunk.file,
        *(layer.file for layer in index.layers),
        *(file.file for file in index.files),
    }
    if os.path.lexists(folder / QUALITY_NAME):
        names.add(QUALITY_NAME)
    contents: dict[str, Path | bytes] = {
        name: locate(folder, name, str(folder)) for name in names - {CARD_NAME}
    }
    contents[CARD_NAME] = card.encode()
    return dict(sorted(contents.items()))


def _refuse_weights(names: Iterable[str], repo: str) -> None:
    """Raise HubError if the repository has weights that transformers would load instead."""
    for name in names:
        if _TRANSFORMERS_WEIGHTS.fullmatch(name):
            raise HubError(
                f"repository {repo} has {name}, which transformers would load instead",
                "delete it there, or choose another repository",
            )


def _message(index: Index) -> str:
    """Return the commit's message, with source and recipe free of Markdown."""
    source, recipe = (
        re.sub(r"[^\w./+ -]", "_", name) for name in (index.source.name, index.recipe.name)
    )
    return f"{source}, {recipe}, by moe-convert"


def _is_same(content: Path | bytes, remote: RemoteFile) -> bool:
    """True if the Hub's file has these bytes."""
    if _size_bytes(content) != remote.size:
        return False
    hasher = remote.hasher()
    if isinstance(content, bytes):
        hasher.update(content)
    else:
        with open(content, "rb") as f:
            hashlib.file_digest(f, lambda: hasher)
    return bool(hasher.hexdigest() == remote.etag)


def _size_bytes(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size
