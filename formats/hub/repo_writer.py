"""Writes to a model repository on the Hub: access, the state of a branch, one commit."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from formats.errors import HubError
from formats.hub.hub_errors import hub_call
from formats.hub.hub_settings import progress_bars
from formats.hub.ranges import RemoteFile, Retries
from formats.hub.repo import HubRepo
from formats.hub.repo_files import read_small_file
from formats.repo_names import check_repo_name

_TOKEN_HINT = "give a token that may write with --token, or log in: hf auth login"
T = TypeVar("T")


@dataclass(frozen=True)
class BranchState:
    """The head of a branch. repo: None if the repository does not exist yet."""

    repo: HubRepo | None = None

    @property
    def commit(self) -> str | None:
        """The commit; None if the repository does not exist yet."""
        return self.repo.commit if self.repo else None

    @property
    def files(self) -> dict[str, RemoteFile]:
        """Files by name."""
        return self.repo.files if self.repo else {}

    def read(self, name: str) -> bytes | None:
        """Return a small file; None if there is none. Raises HubError, DamageError."""
        return read_small_file(self.repo, name) if self.repo and name in self.files else None


@dataclass(frozen=True)
class Commit:
    """A commit that was made. url: its page, or that of its pull request."""

    commit_id: str
    url: str


@dataclass(frozen=True)
class RepoWriter:
    """Makes commits to a branch of `repo`.

    revision: the branch, None for main. token: None for huggingface_hub's. private: create the
    repository private. create_pr: open a pull request instead of committing to the branch.
    Every method that asks the Hub raises HubError.
    """

    repo: str
    revision: str | None = None
    token: str | None = None
    private: bool = False
    create_pr: bool = False
    retries: Retries = field(default_factory=Retries)

    def check_access(self) -> None:
        """Raise HubError unless the token may write to the repository."""
        from huggingface_hub import get_token

        check_repo_name(self.repo)
        where = f"repository {self.repo}"
        if self.token is None and get_token() is None:
            raise HubError(f"{where}: there is no token that may write", _TOKEN_HINT)
        user: dict[str, Any] = self._call(self._api().whoami)
        name = user.get("name")
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise HubError(f"{where}: the token of {name} may only read", _TOKEN_HINT)
        owner = self.repo.partition("/")[0]
        members_of = {organization.get("name") for organization in user.get("orgs", [])}
        # Anybody may propose a pull request.
        if not self.create_pr and owner not in {name, *members_of}:
            raise HubError(
                f"{where}: the token is of {name}, who is no member of {owner}",
                "choose another OWNER/MODEL, or give the owner's token with --token",
            )

    def create(self) -> BranchState:
        """Create repository and branch where they do not exist; return the branch's head."""
        api = self._api()
        self._call(lambda: api.create_repo(self.repo, private=self.private, exist_ok=True))
        branch = self.revision
        if branch and not self.create_pr:
            self._call(lambda: api.create_branch(self.repo, branch=branch, exist_ok=True))
        return self._head(branch)

    def state(self) -> BranchState:
        """Return the branch's head; main's where the branch does not exist. Changes nothing."""
        api = self._api()
        branch = self.revision
        if not self._call(lambda: api.repo_exists(self.repo)):
            return BranchState()
        if branch and not self._call(lambda: api.revision_exists(self.repo, branch)):
            branch = None
        return self._head(branch)

    def commit(
        self,
        message: str,
        contents: dict[str, Path | bytes],
        deleted: list[str],
        parent: str | None,
        *,
        bars: bool,
    ) -> Commit:
        """Add `contents` (file name -> bytes or a local file) and delete `deleted` in one commit.

        parent: the expected head; the Hub refuses the commit if somebody committed after it.
        bars: let huggingface_hub draw its progress.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        # Made once for all attempts: they record which files are uploaded already.
        operations: list[Any] = [
            *(CommitOperationAdd(name, content) for name, content in contents.items()),
            *(CommitOperationDelete(name) for name in deleted),
        ]
        # Not upload_folder: it makes several commits where hf_xet is installed.
        with progress_bars(bars):
            info = self._call(
                lambda: self._api().create_commit(
                    self.repo,
                    operations,
                    commit_message=message,
                    revision=self.revision,
                    create_pr=self.create_pr,
                    parent_commit=parent,
                )
            )
        return Commit(str(info.oid), str(info.pr_url or info.commit_url))

    def card_problems(self, card: str) -> list[str]:
        """Return the Hub's objections to the metadata of a model card; empty if it accepts them."""
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session, hf_raise_for_status

        # ModelCard.validate sends the metadata as it parsed them, not the text of the card.
        request = {"content": card, "repoType": "model"}

        def ask() -> list[str]:
            answer = get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json=request)
            if answer.status_code == 400:
                errors = [str(e.get("message")) for e in answer.json().get("errors", [])]
                return errors or ["no reason given"]
            hf_raise_for_status(answer)
            return []

        return self._call(ask)

    def _head(self, branch: str | None) -> BranchState:
        return BranchState(HubRepo.open(self.repo, branch, self.token, self.retries))

    def _api(self) -> Any:
        from huggingface_hub import HfApi

        return HfApi(token=self.token, library_name="moe-convert")

    def _call(self, call: Callable[[], T]) -> T:
        return hub_call(call, self.repo, self.retries)
