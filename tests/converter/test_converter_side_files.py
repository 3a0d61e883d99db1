"""The small files next to the weights: copied, left out with a warning, or refused at once."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from converter.convert import convert_checkpoint
from converter.output.source_side_files import check_side_files, copy_files
from converter.recipe.recipes import make_recipe
from formats.errors import MoeConvertError, SourceError
from formats.index import read_index

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1795303\n"
)
COPIES = [
    "tokenizer.json~",
    "tokenizer.json.bak",
    "#tokenizer.json#",
    ".tokenizer.json.swp",
    "tokenizer.json.orig",
    "tokenizer (1).json",
    "tokenizer_config (2).json",
    "tokenizer.model.old",
    "LICENSE~",
    "LICENSE (1)",
    "chat_template.jinja.save",
    "vocab - Copy.json",
    "tokenizer.py",
]


@pytest.fixture
def checkpoint(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "checkpoint"))


def convert(folder: Path) -> Path:
    out = folder.with_name("out")
    convert_checkpoint(folder, out, make_recipe("2bit", solver="hqq"))
    return out


def test_what_transformers_saves_is_copied_and_code_is_not(tmp_path: Path) -> None:
    copied = [
        "LICENSE",
        "NOTICE.txt",
        "USE_POLICY.md",
        "added_tokens.json",
        "additional_chat_templates/tool use.jinja",
        "chat_template.jinja",
        "chat_template.json",
        "generation_config.json",
        "merges.txt",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "spiece.model",
        "tekken.json",
        "tokenizer.4.0.0.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer.model.v3",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    ]
    other = [
        "README.md",
        "config.json",
        "model.safetensors",
        "pytorch_model.bin",
        "adapter_config.json",
        "args.bin",
        "custom_generate/generate.py",
        "tokenization_own.py",
        "additional_chat_templates/code.py",
        "sub/tokenizer.json",
    ]
    for name in [*copied, *other]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}" if name == "generation_config.json" else name)
    assert sorted(check_side_files(tmp_path)) == copied
    (tmp_path / "out").mkdir()
    files = copy_files(dict.fromkeys(copied, tmp_path), tmp_path / "out")
    assert [file.file for file in files] == copied
    for name in copied:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_by_an_editor_or_browser_is_left_out_with_a_warning(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    before = check_side_files(checkpoint)
    (checkpoint / name).write_text("{}")
    caplog.set_level(logging.WARNING)
    assert check_side_files(checkpoint) == before
    assert [r.getMessage().split(" is left out")[0] for r in caplog.records] == [
        str(checkpoint / name)
    ]


def test_a_folder_full_of_copies_converts(checkpoint: Path) -> None:
    for name in COPIES:
        (checkpoint / name).write_text("{}")
    files = {file.file for file in read_index(convert(checkpoint)).files}
    assert files == {
        "config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def dangling(path: Path) -> None:
    path.symlink_to("/nowhere/at/all")


def pointer(path: Path) -> None:
    path.write_bytes(POINTER)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def unreadable(path: Path) -> None:
    path.write_text("{}")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("root reads everything")


BAD = {
    dangling: "link to /nowhere/at/all", Path.mkdir: "is a folder", pointer: "git-lfs pointer",
    pipe: "not a regular file", unreadable: "cannot be opened",
}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "generation_config.json", "additional_chat_templates/rag.jinja"]
)
@pytest.mark.parametrize("spoil", BAD)
def test_a_needed_file_that_cannot_be_copied_is_refused_before_the_first_weight(
    checkpoint: Path, spoil: Callable[[Path], None], name: str
) -> None:
    (checkpoint / name).unlink(missing_ok=True)
    (checkpoint / name).parent.mkdir(exist_ok=True)
    spoil(checkpoint / name)
    with pytest.raises(SourceError, match=f"{name}.*{BAD[spoil]}") as caught:
        convert(checkpoint)
    assert caught.value.hint
    assert not checkpoint.with_name("out").exists()


def test_the_hint_for_a_pointer_fetches_the_file(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_bytes(POINTER)
    with pytest.raises(SourceError) as caught:
        check_side_files(checkpoint)
    assert caught.value.hint.startswith(f"git -C {checkpoint} lfs pull")


@pytest.mark.parametrize("spoil", BAD)
def test_an_optional_file_that_cannot_be_copied_is_left_out_with_a_warning(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], None]
) -> None:
    before = check_side_files(checkpoint)
    spoil(checkpoint / "LICENSE")
    assert check_side_files(checkpoint) == before
    assert BAD[spoil] in caplog.text


def test_links_of_the_users_own_folder_are_followed(checkpoint: Path, tmp_path: Path) -> None:
    shutil.move(checkpoint / "tokenizer.json", tmp_path / "elsewhere.json")
    (checkpoint / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    out = convert(checkpoint)
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "elsewhere.json").read_bytes()
    assert not (out / "tokenizer.json").is_symlink()


def test_a_file_in_the_place_of_the_folder_of_templates_is_refused(checkpoint: Path) -> None:
    (checkpoint / "additional_chat_templates").write_text("")
    with pytest.raises(MoeConvertError, match="not a folder"):
        check_side_files(checkpoint)
