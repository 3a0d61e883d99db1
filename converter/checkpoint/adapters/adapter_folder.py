"""An adapter's files: in a local folder, or in a Hub repository at one commit."""

import hashlib
import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from converter.checkpoint.adapters.adapter_config import (
    CONFIG_NAME,
    GET_AGAIN_HINT,
    MAX_CONFIG_BYTES,
    AdapterConfig,
    parse_adapter_config,
)
from converter.checkpoint.adapters.adapter_tensors import WEIGHTS_NAME
from formats.config.generation_config import GENERATION_NAME
from formats.config.side_files import (
    MAX_BYTES,
    MAX_FILES,
    VOCABULARIES,
    is_read_by_transformers,
    names_beside_weights,
)
from formats.errors import DamageError, MoeConvertError, SourceError
from formats.files.io_errors import translated
from formats.files.paths import locate_source, open_regular, read_small_source, similar_folders
from formats.hub.repo import HubRepo
from formats.index import Adapter
from formats.install import install_extra
from formats.labels import to_label
from formats.repo_names import is_repo_name

_PICKLE_NAME = "adapter_model.bin"
_READ_BYTES = 4 << 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterFolder:
    """A LoRA adapter.

    name: the name of its folder, or owner/name. revision: the commit of a Hub repository, None for
    a folder. config_sha256, weights_sha256: of its two files, in hex.
    """

    folder: Path
    name: str
    revision: str | None
    config: AdapterConfig
    config_sha256: str
    weights_sha256: str

    @property
    def where(self) -> str:
        """The adapter in messages: its folder, or owner/name@commit."""
        return f"{self.name}@{self.revision[:12]}" if self.revision else str(self.folder)

    @property
    def recorded(self) -> Adapter:
        """The adapter as the index records it."""
        return Adapter(self.name, self.revision, self.config_sha256, self.weights_sha256)

    @property
    def sha256(self) -> str:
        """The hashes of its two files, which decide the merge."""
        return f"{self.config_sha256} {self.weights_sha256}"

    @cached_property
    def tokenizer_files(self) -> list[str]:
        """Names of its tokenizer files and chat templates; empty without a vocabulary."""
        names = list(filter(is_tokenizer_file, names_beside_weights(self.folder)))
        if any(fnmatchcase(name, pattern) for name in names for pattern in VOCABULARIES):
            return names
        if names:
            _log.warning(
                "%s: %s left out: the adapter has no vocabulary beside it",
                self.where,
                ", ".join(names),
            )
        return []

    @classmethod
    def open(cls, name: str, token: str | None = None) -> "AdapterFolder":
        """Open the folder `name`, or else the Hub repository owner/name or owner/name@revision.

        The files of a repository are downloaded into the user's cache. token: of the Hub. Raises
        SourceError for anything but a LoRA adapter in safetensors; HubError; MoeConvertError with
        the install command if PEFT is not installed.
        """
        if find_spec("peft") is None:
            raise MoeConvertError("--adapter needs the package peft", install_extra("adapters"))
        repo_name, _, revision = name.partition("@")
        if Path(name).exists() or not is_repo_name(repo_name):
            folder = Path(name)
            if not folder.is_dir():
                near = similar_folders(folder)
                raise SourceError(
                    f"--adapter {name}: is not a folder",
                    f"is {' or '.join(near)} meant?"
                    if near
                    else "name an adapter's folder, or a repository as owner/name",
                )
            with translated(folder, "read", SourceError):
                _check_names([path.name for path in folder.iterdir()], str(folder))
            return cls._read(folder, to_label(folder.resolve().name), None)
        repo = HubRepo.open(repo_name, revision or None, token)
        _check_names(repo.files, repo.where)
        return cls._read(_fetched(repo), repo.repo, repo.commit)

    @classmethod
    def _read(cls, folder: Path, name: str, revision: str | None) -> "AdapterFolder":
        where = str(folder / CONFIG_NAME)
        try:
            data = read_small_source(folder, CONFIG_NAME, str(folder), max_bytes=MAX_CONFIG_BYTES)
        except DamageError as e:
            raise SourceError(e.message, GET_AGAIN_HINT) from None
        config = parse_adapter_config(data, where)
        sha256 = hashlib.sha256(data).hexdigest()
        return cls(folder, name, revision, config, sha256, _weights_sha256(folder))


def other_adapters(
    recorded: Sequence[Adapter], given: Sequence[AdapterFolder]
) -> tuple[str, str] | None:
    """Return (difference, options to use) unless `given` are the adapters that an index records."""
    if [adapter.sha256 for adapter in given] == [
        f"{adapter.config_sha256} {adapter.weights_sha256}" for adapter in recorded
    ]:
        return None
    old = ", ".join(_with_hashes(adapter.name, adapter) for adapter in recorded)
    new = ", ".join(_with_hashes(adapter.where, adapter.recorded) for adapter in given)
    return (
        f"converted with the adapters {old or 'none'}; given: {new or 'none'}",
        " ".join(f"--adapter {_option_value(adapter)}" for adapter in recorded) or "no --adapter",
    )


def _with_hashes(name: str, adapter: Adapter) -> str:
    """Return the name with hashes: adapters of one name may differ in files."""
    return f"{name} (config {adapter.config_sha256[:8]}, weights {adapter.weights_sha256[:8]})"


def _option_value(recorded: Adapter) -> str:
    """Return the repository and commit; FOLDER for a folder, whose place is not recorded.

    A stranger's index may hold any text.
    """
    if is_repo_name(recorded.name) and re.fullmatch("[0-9a-f]{40}", recorded.revision or ""):
        return f"{recorded.name}@{recorded.revision}"
    return "FOLDER"


def is_tokenizer_file(name: str) -> bool:
    """True for a file of a tokenizer, or a chat template."""
    return is_read_by_transformers(name) and name != GENERATION_NAME


def _check_names(names: Collection[str], where: str) -> None:
    """Raise SourceError unless the file names are those of an adapter in safetensors."""
    if CONFIG_NAME not in names:
        raise SourceError(
            f"--adapter {where}: file {CONFIG_NAME} is missing",
            "name the folder that peft's save_pretrained wrote; merged weights are a checkpoint:"
            " moe-convert convert CHECKPOINT",
        )
    if WEIGHTS_NAME not in names and _PICKLE_NAME in names:
        raise SourceError(
            f"--adapter {where}: has only pickled weights ({_PICKLE_NAME}), which can run code and"
            " are never read",
            "save the adapter again with a present release of peft, in a sandbox:"
            " model.save_pretrained(FOLDER)",
        )
    if WEIGHTS_NAME not in names:
        raise SourceError(f"--adapter {where}: file {WEIGHTS_NAME} is missing", GET_AGAIN_HINT)


def _fetched(repo: HubRepo) -> Path:
    """Download an adapter's files into the user's cache; return their folder."""
    small = [CONFIG_NAME, *filter(is_tokenizer_file, repo.files)]
    if len(small) > MAX_FILES:
        raise SourceError(
            f"{repo.where}: {len(small)} small files, the limit is {MAX_FILES}",
            "name the repository of an adapter",
        )
    for name in small:
        limit = MAX_CONFIG_BYTES if name == CONFIG_NAME else MAX_BYTES
        if repo.file(name).size > limit:
            raise SourceError(
                f"{repo.file(name)} has {repo.file(name).size} bytes, the limit is {limit}",
                "name the repository of an adapter",
            )
    # The name of a side file has no character with a meaning in a pattern.
    return repo.snapshot([*small, WEIGHTS_NAME])


def _weights_sha256(folder: Path) -> str:
    path = locate_source(folder, WEIGHTS_NAME, str(folder))
    with translated(path, "read", SourceError), open(open_regular(path), "rb") as f:
        digest = hashlib.sha256()
        while chunk := f.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
