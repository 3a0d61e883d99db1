"""What a source is where it is no checkpoint that is converted, and what its user can do."""

import json
import shlex
from collections.abc import Collection
from pathlib import Path

from formats import INDEX_NAME as CONVERTED_NAME
from formats import JOURNAL_NAME
from formats.errors import SourceError
from formats.files.paths import similar_folders
from formats.hub.repo import is_repo_name, repo_of_address

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def check_folder(folder: Path) -> None:
    """SourceError unless `folder` is one, and may hold a checkpoint."""
    if folder.is_file():
        check_names([folder.name], str(folder), str(folder))
        raise SourceError(f"{folder} is a file, not a folder", f"name its folder: {folder.parent}")
    if not folder.is_dir():
        raise SourceError(f"{folder} is not a folder", _hint_for_no_folder(folder))
    names = [path.name for path in folder.iterdir()]
    check_names(names, str(folder), str(folder))
    if "config.json" not in names:
        inner = sorted(
            path.parent
            for pattern in ("*", "snapshots/*")
            for path in folder.glob(f"{pattern}/config.json")
        )
        raise SourceError(
            f"{folder}: file config.json is missing",
            f"name the folder that holds it: {inner[0]}"
            if inner
            else "name the folder of a checkpoint",
        )


def check_names(names: Collection[str], name: str, where: str) -> None:
    """SourceError if the files `names` of a folder or repository are those of something else than a
    checkpoint in transformers' layout. Where there are no weights at all, nothing is said.

    name: what commands call it; where: the same for messages, with a commit.
    """
    if CONVERTED_NAME in names:
        raise SourceError(
            f"{where} is converted already (it has {CONVERTED_NAME})",
            f"name the checkpoint that it was converted from, which moe-convert inspect {shlex.quote(name)} shows",
        )
    if JOURNAL_NAME in names:
        raise SourceError(
            f"{where} holds an unfinished conversion (it has {JOURNAL_NAME})",
            f"name the checkpoint that is being converted, and this folder after -o: moe-convert convert CHECKPOINT"
            f" -o {shlex.quote(name)}",
        )
    if "adapter_config.json" in names:
        raise SourceError(
            f"{where} holds an adapter (it has adapter_config.json), which a conversion would leave out",
            f"merge it into its base model first: {merge_command(name)}",
        )
    if SINGLE_NAME in names or INDEX_NAME in names:
        return
    if gguf := [name for name in names if name.endswith(".gguf")]:
        raise SourceError(
            f"{where} holds a GGUF file ({min(gguf)}), which is quantized already or has another program's layout",
            "use the safetensors checkpoint that it was made from",
        )
    if consolidated := [name for name in names if name.startswith("consolidated")]:
        raise SourceError(
            f"{where} has Mistral's own layout ({min(consolidated)}), not transformers'",
            "get the files of the same repository in transformers' layout:"
            ' hf download OWNER/MODEL --exclude "consolidated*" --local-dir FOLDER',
        )
    if pickles := [name for name in names if name.endswith(_PICKLES)]:
        raise SourceError(
            f"{where}: has only pickled weights ({min(pickles)}), which can run code and are never read",
            "use a safetensors version of the model, or save it with safe_serialization in a sandbox",
        )


def merge_command(name: str) -> str:
    """The command by which peft merges the adapter `name`."""
    code = (
        f"from peft import AutoPeftModelForCausalLM as M; M.from_pretrained({json.dumps(name)})"
        '.merge_and_unload().save_pretrained("merged")'
    )
    return f"python -c {shlex.quote(code)}"


def _hint_for_no_folder(folder: Path) -> str:
    if repo := repo_of_address(str(folder)):
        return f"name the repository, not its page: {repo}"
    may_be_repo = is_repo_name(str(folder))
    # A repository's name is no mistyped path where there is no folder of its owner's name.
    if (folder.parent.is_dir() or not may_be_repo) and (near := similar_folders(folder)):
        return f"is {' or '.join(near)} meant?"
    if may_be_repo:
        return f"if it is a Hub repository, fetch it: hf download {folder} --local-dir model"
    return "name the folder of a checkpoint, or a repository as owner/model"
