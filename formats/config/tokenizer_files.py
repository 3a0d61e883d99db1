"""A tokenizer's files: checks before transformers reads them, and the file to blame on failure."""

import importlib.util
import json
import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from formats.config.side_files import TEMPLATES_FOLDER, VOCABULARIES, unusable
from formats.config.strict_json import parse
from formats.errors import PathError, TokenizerError
from formats.files.paths import check_name
from formats.install import pip_install

_TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
_MAX_CONFIG_BYTES = 16 << 20
_CLASS = re.compile(
    r"\w*Tokenizer(Fast)?|PreTrainedTokenizerFast"
    r"|(Tokenizers|Python|SentencePiece|MistralCommon)Backend"
)
"""transformers would take any of its classes by name, also those that load weights."""
_JSON_FILES = (
    _TOKENIZER_CONFIG_NAME,
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
    "config.json",
)
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\n")

T = TypeVar("T")


def open_tokenizer_by(load: Callable[[str], T], folder: Path) -> T:
    """Load a tokenizer with `load`, transformers' function, and try it on a few words.

    Raises TokenizerError with the file to blame.
    """
    check_tokenizer_files(folder)
    try:
        tokenizer: Any = load(str(folder))
        ids = tokenizer("Some words.")["input_ids"]
        tokenizer.decode(ids, skip_special_tokens=True)
        tokenizer.get_vocab()
        for name in ("bos", "eos", "unk", "pad"):
            getattr(tokenizer, f"{name}_token_id")
    except BaseException as e:
        # A panic of the Rust library is a BaseException, but not an Exception.
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise _failure(folder, e) from e
    return tokenizer  # type: ignore[no-any-return]


def check_tokenizer_files(folder: Path) -> None:
    """Check vocabulary and tokenizer_config.json.

    Raises TokenizerError if the vocabulary is missing or too large, or if the configuration names
    code, a class other than a tokenizer, or a file outside of the folder.
    """
    vocabularies = _vocabularies(folder)
    if not vocabularies:
        raise TokenizerError(
            f"{folder}: has no tokenizer (tokenizer.json, tokenizer.model or the like)"
        )
    for path in vocabularies:
        if problem := unusable(path):
            raise TokenizerError(f"{path}: {problem[0]}", problem[1])
    path = folder / _TOKENIZER_CONFIG_NAME
    if path.exists():
        _check_tokenizer_config(path)


def _check_tokenizer_config(path: Path) -> None:
    if problem := unusable(path):
        raise TokenizerError(f"{path}: {problem[0]}", problem[1])
    config = parse(path.read_bytes(), str(path), max_bytes=_MAX_CONFIG_BYTES, error=TokenizerError)
    if not isinstance(config, dict):
        raise TokenizerError(f"{path}: not an object")
    code = config.get("auto_map")
    if code and (not isinstance(code, dict) or "AutoTokenizer" in code):
        raise TokenizerError(
            f"{path}: has auto_map: the tokenizer needs code of its own, which is never run",
            "remove the field if a tokenizer class of transformers reads these files",
        )
    name = config.get("tokenizer_class")
    if name is not None and not (isinstance(name, str) and _CLASS.fullmatch(name)):
        raise TokenizerError(
            f"{path}: tokenizer_class is {name!r}, which is not a tokenizer",
            "correct or remove the field",
        )
    files = config.get("fast_tokenizer_files")
    if files is not None and not (
        isinstance(files, list) and all(isinstance(f, str) and _is_plain(f) for f in files)
    ):
        raise TokenizerError(
            f"{path}: fast_tokenizer_files is {files!r}, expected names of files in the folder",
            "correct or remove the field",
        )


def _vocabularies(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.iterdir() if any(fnmatchcase(p.name, pattern) for pattern in VOCABULARIES)
    )


def _is_plain(name: str) -> bool:
    try:
        return "/" not in check_name(name, "")
    except PathError:
        return False


def _failure(folder: Path, error: BaseException) -> TokenizerError:
    """Turn an error of transformers into one that names the file to blame."""
    broken = [*_broken_json(folder), *_broken_templates(folder)]
    if broken:
        return broken[0]
    vocabularies = _vocabularies(folder)
    if not (folder / "tokenizer.json").exists() and (model := _model(vocabularies)):
        packages, purpose = _needed_packages(model)
        if missing := [
            package for package, module in packages.items() if not _is_installed(module)
        ]:
            return TokenizerError(
                f"{model}: {purpose} needs {' and '.join(missing)}, not installed",
                pip_install(*packages),
            )
        return TokenizerError(
            f"{model}: transformers cannot read it: {_short(error)}", "get the file again"
        )
    names = [path.name for path in vocabularies]
    if (folder / _TOKENIZER_CONFIG_NAME).exists():
        names.append(_TOKENIZER_CONFIG_NAME)
    return TokenizerError(
        f"{folder}: transformers cannot load the tokenizer ({', '.join(names)}): {_short(error)}",
        "get the tokenizer's files again",
    )


def _broken_json(folder: Path) -> list[TokenizerError]:
    broken = []
    for path in (folder / name for name in _JSON_FILES if (folder / name).exists()):
        fault = ""
        try:
            if not isinstance(json.loads(path.read_bytes()), dict):
                fault = "not an object"
        except (OSError, ValueError, RecursionError) as e:
            fault = f"not JSON: {_short(e)}"
        if problem := unusable(path):
            broken.append(TokenizerError(f"{path}: {problem[0]}", problem[1]))
        elif fault:
            broken.append(TokenizerError(f"{path}: {fault}", "get the file again"))
    return broken


def _broken_templates(folder: Path) -> list[TokenizerError]:
    broken = []
    for path in (*folder.glob("chat_template.jinja"), *folder.glob(f"{TEMPLATES_FOLDER}/*.jinja")):
        try:
            path.read_bytes().decode()
        except (OSError, ValueError) as e:
            broken.append(TokenizerError(f"{path}: not UTF-8: {_short(e)}", "get the file again"))
    return broken


def _model(vocabularies: list[Path]) -> Path | None:
    """Return the SentencePiece or tiktoken file that transformers reads without tokenizer.json."""
    return next((path for path in vocabularies if ".model" in path.name), None)


def _needed_packages(model: Path) -> tuple[dict[str, str], str]:
    """Return (package to install -> its module, kind of the file)."""
    with open(model, "rb") as file:
        if _TIKTOKEN_LINE.match(file.read(4096)):
            return {"tiktoken": "tiktoken"}, "a tiktoken vocabulary"
    return {
        "sentencepiece": "sentencepiece",
        "protobuf": "google.protobuf",
    }, "a SentencePiece model"


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
