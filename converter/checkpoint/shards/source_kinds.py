"""Recognizes sources that are no checkpoint in transformers' layout, and says what to do."""

import shlex
from collections.abc import Collection
from pathlib import Path

from formats import INDEX_NAME, JOURNAL_NAME
from formats.errors import SourceError
from formats.files.paths import similar_folders
from formats.repo_names import is_repo_name, repo_of_address

SINGLE_NAME = "model.safetensors"
SHARD_INDEX_NAME = "model.safetensors.index.json"
_ADAPTER_NAME = "adapter_config.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def check_folder(folder: Path) -> None:
    """Raise SourceError unless `folder` is a folder that may hold a checkpoint."""
    if folder.is_file():
        check_names([folder.name], str(folder), str(folder))
        raise SourceError(f"{folder} is a file, not a folder", f"name its folder: {folder.parent}")
    if not folder.is_dir():
        raise SourceError(f"{folder} is not a folder", _no_folder_hint(folder))
    names = [path.name for path in folder.iterdir()]
    check_names(names, str(folder), str(folder))
    if "config.json" not in names:
        raise SourceError(f"{folder}: file config.json is missing", _no_config_hint(folder))


def check_names(names: Collection[str], name: str, where: str) -> None:
    """Raise SourceError if file names show something else than a checkpoint.

    Files without any weights are no error here. names: all files of a folder or repository. name:
    its name on the command line. where: its name in messages, with a commit.
    """
    _check_conversion(names, name, where)
    if _ADAPTER_NAME in names:
        raise SourceError(
            f"{where} holds an adapter (it has {_ADAPTER_NAME}), which a conversion would leave"
            " out",
            "name its base model, and the adapter after --adapter: moe-convert convert BASE"
            f" --adapter {shlex.quote(name)}",
        )
    if SINGLE_NAME not in names and SHARD_INDEX_NAME not in names:
        _check_other_weights(names, where)


def _check_conversion(names: Collection[str], name: str, where: str) -> None:
    """Raise SourceError for a converted folder, complete or not."""
    if INDEX_NAME in names:
        raise SourceError(
            f"{where} is converted already (it has {INDEX_NAME})",
            "name the checkpoint that it was converted from, which moe-convert inspect"
            f" {shlex.quote(name)} shows",
        )
    if JOURNAL_NAME in names:
        raise SourceError(
            f"{where} holds an unfinished conversion (it has {JOURNAL_NAME})",
            "name the checkpoint that is being converted, and this folder after -o:"
            f" moe-convert convert CHECKPOINT -o {shlex.quote(name)}",
        )


def _check_other_weights(names: Collection[str], where: str) -> None:
    """Raise SourceError for weights in another layout than transformers' safetensors."""
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        raise SourceError(
            f"{where} holds a GGUF file ({min(gguf)}), which is quantized already or has another"
            " program's layout",
            "use the safetensors checkpoint that it was made from",
        )
    consolidated = [name for name in names if name.startswith("consolidated")]
    if consolidated:
        raise SourceError(
            f"{where} has Mistral's own layout ({min(consolidated)}), not transformers'",
            "get the files of the same repository in transformers' layout:"
            ' hf download OWNER/MODEL --exclude "consolidated*" --local-dir FOLDER',
        )
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise SourceError(
            f"{where}: has only pickled weights ({min(pickles)}), which can run code and are never"
            " read",
            "use a safetensors version of the model, or save it with safe_serialization in a"
            " sandbox",
        )


def _no_folder_hint(folder: Path) -> str:
    if repo := repo_of_address(str(folder)):
        return f"name the repository, not its page: {repo}"
    may_be_repo = is_repo_name(str(folder))
    # Without a folder of the owner's name, a repository's name is no mistyped path.
    if folder.parent.is_dir() or not may_be_repo:
        near = similar_folders(folder)
        if near:
            return f"is {' or '.join(near)} meant?"
    if may_be_repo:
        return f"if it is a Hub repository, fetch it: hf download {folder} --local-dir model"
    return "name the folder of a checkpoint, or a repository as owner/model"


def _no_config_hint(folder: Path) -> str:
    inner = sorted(
        path.parent
        for pattern in ("*", "snapshots/*")
        for path in folder.glob(f"{pattern}/config.json")
    )
    if inner:
        return f"name the folder that holds it: {inner[0]}"
    return "name the folder of a checkpoint"
