"""Models from the Hub: downloaded whole, or each expert when a token needs it."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from lazy_repository import PROMPT, REPO, expert_bytes, fetched, filled, generate, local

import loader
from converter.cli.main import main
from formats.errors import (
    FormatError,
    NotConvertedError,
    RecipeError,
)

__all__ = ["filled", "local"]


def test_tokens_are_those_of_the_local_folder_and_no_expert_comes_twice(
    filled: HubServer, local: Path
) -> None:
    assert generate(REPO, lazy=True) == generate(local)
    assert 0 < fetched(filled) <= expert_bytes(local)


def test_a_whole_repository_is_used_in_the_cache_and_never_written_to(
    filled: HubServer, local: Path
) -> None:
    assert generate(REPO) == generate(local)
    blobs = [
        p
        for p in (Path(os.environ["HF_HOME"]) / "hub").rglob("*")
        if p.is_file() and not p.is_symlink()
    ]
    names = {hashlib.sha256(p.read_bytes()).hexdigest() for p in blobs}
    assert {b.sha256 for name, b in filled.head(REPO).files.items() if b.lfs} <= names
    filled.requests.clear()
    generate(REPO)
    assert filled.served() == 0


def test_a_revision_is_loaded(filled: HubServer, local: Path) -> None:
    old = filled.head(REPO).oid
    filled.commit(REPO, {"moe_index.json": b"{}"})
    with pytest.raises(FormatError):
        loader.from_pretrained(REPO)
    assert generate(REPO, revision=old, lazy=True) == generate(local)


def test_a_tokenizer_comes_without_weights(filled: HubServer, local: Path) -> None:
    tokenizer = loader.load_tokenizer(REPO)
    assert tokenizer(PROMPT).input_ids == loader.load_tokenizer(local)(PROMPT).input_ids
    assert filled.served("safetensors") == 0


def test_an_ordinary_checkpoint_is_refused_before_it_is_fetched(
    hub: HubServer, example_folder: Path
) -> None:
    hub.add("me/tiny", example_folder)
    with pytest.raises(NotConvertedError, match="is not converted"):
        loader.from_pretrained("me/tiny")
    with pytest.raises(NotConvertedError, match="is not converted"):
        loader.from_pretrained("me/tiny", lazy=True)
    assert hub.served() == 0


def test_options_that_cannot_be_are_refused(filled: HubServer, local: Path) -> None:
    with pytest.raises(RecipeError, match="mmap"):
        loader.from_pretrained(REPO, lazy=True, io="mmap")
    with pytest.raises(RecipeError, match="only for a repository"):
        loader.from_pretrained(local, lazy=True)


def test_generate_says_what_is_there(
    filled: HubServer, local: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*args: object) -> dict[str, Any]:
        with pytest.raises(SystemExit) as exit_:
            main(
                [
                    "generate",
                    *map(str, args),
                    "--kernels",
                    "torch",
                    "--max-new-tokens",
                    "6",
                    "--prompt",
                    PROMPT,
                ]
            )
        assert exit_.value.code == 0
        value: dict[str, Any] = json.loads(capsys.readouterr().out)
        return value

    lazy = run(REPO, "--lazy", "--json")
    assert lazy["text"] == run(local, "--json")["text"]
    assert 0 < lazy["experts_there_bytes"] <= lazy["experts_bytes"] == expert_bytes(local)
