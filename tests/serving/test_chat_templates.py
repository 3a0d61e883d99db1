"""Chat templates from a checkpoint to a chat: converted, published, downloaded, lazily loaded,
repaired and verified.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from transformers import AutoTokenizer

import loader
from converter.convert import convert_checkpoint
from converter.recipe.recipes import make_recipe
from formats.errors import MoeConvertError
from formats.index import read_index
from formats.reading.verify import verify_folder

REPO = "me/chatty"
TEMPLATES = {
    "default": "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}",
    "tool_use": "tools: {{ messages[0].content }}",
    "rag 2": "documents for {{ messages | length }} – messages",
}
MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture(
    scope="module", params=[True, False], ids=["jinja files", "in tokenizer_config.json"]
)
def chatty(
    request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A checkpoint, converted, whose tokenizer was saved by transformers with several templates."""
    folder = Path(shutil.copytree(source, tmp_path_factory.mktemp("chatty") / "source"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATES
    tokenizer.save_pretrained(folder, save_jinja_files=request.param)
    assert (folder / "additional_chat_templates/tool_use.jinja").exists() == request.param
    out = folder.with_name("out")
    convert_checkpoint(folder, out, make_recipe("2bit", solver="hqq"))
    return out


def assert_has_all(tokenizer: Any) -> None:
    assert tokenizer.chat_template == TEMPLATES
    said = {
        name: tokenizer.apply_chat_template(MESSAGES, chat_template=name, tokenize=False)
        for name in TEMPLATES
    }
    assert said == {
        "default": "[user] Hello\n",
        "tool_use": "tools: Hello",
        "rag 2": "documents for 1 – messages",
    }


def test_templates_survive_a_conversion(chatty: Path) -> None:
    assert_has_all(loader.load_tokenizer(chatty))
    assert verify_folder(chatty, read_data=True).problems == []


def test_templates_survive_the_hub(
    chatty: Path, hub: HubServer, tmp_path: Path, run_command: Callable[..., tuple[int, str, str]]
) -> None:
    assert run_command("upload", chatty, REPO, "--license", "mit", "-q")[0] == 0
    assert run_command("download", REPO, "--local-dir", tmp_path / "fetched", "-q")[0] == 0
    assert_has_all(loader.load_tokenizer(tmp_path / "fetched"))
    # Only small files are fetched for a tokenizer.
    hub.requests.clear()
    assert_has_all(loader.load_tokenizer(REPO))
    assert hub.served("safetensors") == 0
    lazy = loader.from_pretrained(REPO, kernels="torch", lazy=True)
    assert_has_all(loader.load_tokenizer(lazy.name_or_path))


def test_the_hub_repairs_a_template(
    chatty: Path, hub: HubServer, tmp_path: Path, run_command: Callable[..., tuple[int, str, str]]
) -> None:
    hub.add(REPO, chatty)
    folder = Path(shutil.copytree(chatty, tmp_path / "folder"))
    name = next(
        f.file
        for f in read_index(folder).files
        if "jinja" in f.file or f.file == "tokenizer_config.json"
    )
    (folder / name).unlink()
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    assert verify_folder(folder).problems[0].file == name
    assert run_command("repair", folder, "--from", REPO, "-q")[0] == 0
    assert_has_all(loader.load_tokenizer(folder))


def test_the_source_repairs_a_template(
    chatty: Path, tmp_path: Path, run_command: Callable[..., tuple[int, str, str]]
) -> None:
    folder = Path(shutil.copytree(chatty, tmp_path / "folder"))
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    (folder / "tokenizer_config.json").write_text("{}")
    assert run_command("repair", folder, "--from", chatty.with_name("source"), "-q")[0] == 0
    assert_has_all(loader.load_tokenizer(folder))


def test_a_hub_source_keeps_its_templates(chatty: Path, hub: HubServer, tmp_path: Path) -> None:
    from converter.checkpoint.shards.hub_model import HubModel

    hub.add("me/source", chatty.with_name("source"))
    convert_checkpoint(
        HubModel.open("me/source"), tmp_path / "out", make_recipe("2bit", solver="hqq")
    )
    assert_has_all(loader.load_tokenizer(tmp_path / "out"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("additional_chat_templates/../../x.jinja", "not a plain relative path"),
        ("/etc/passwd", "not a plain relative path"),
        ("trunk.safetensors", "not a file beside"),
        ("experts/layer-000.safetensors", "not a file beside"),
        ("MOE_INDEX.json", "not a file beside"),
    ],
)
def test_a_listed_file_outside_the_folder_or_over_the_weights_is_refused(
    chatty: Path, hub: HubServer, tmp_path: Path, name: str, message: str
) -> None:
    folder = Path(shutil.copytree(chatty, tmp_path / "folder"))
    index = json.loads((folder / "moe_index.json").read_text())
    index["files"].append({"file": name, "size_bytes": 1, "sha256": "0" * 64})
    (folder / "moe_index.json").write_text(json.dumps(index))
    assert message in verify_folder(folder).problems[0].message
    hub.add(REPO, folder)
    for load in (
        lambda: loader.from_pretrained(folder, kernels="torch"),
        lambda: loader.from_pretrained(REPO, kernels="torch", lazy=True),
    ):
        with pytest.raises(MoeConvertError, match=message):
            load()


def test_a_repair_writes_nothing_through_a_link_out_of_the_folder(
    chatty: Path, hub: HubServer, tmp_path: Path, run_command: Callable[..., tuple[int, str, str]]
) -> None:
    hub.add(REPO, chatty)
    folder = Path(shutil.copytree(chatty, tmp_path / "folder"))
    shutil.rmtree(folder / "experts")
    (tmp_path / "elsewhere").mkdir()
    (folder / "experts").symlink_to(tmp_path / "elsewhere")
    code, _, err = run_command("repair", folder, "--from", REPO, "-q")
    assert code == 1
    assert "is a symbolic link" in err
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_repair_writes_nothing_through_a_link_that_looks_like_an_unfinished_download(
    chatty: Path, hub: HubServer, tmp_path: Path, run_command: Callable[..., tuple[int, str, str]]
) -> None:
    hub.add(REPO, chatty)
    folder = Path(shutil.copytree(chatty, tmp_path / "folder"))
    (folder / "tokenizer.json").unlink()
    (tmp_path / "profile").write_text("mine")
    (folder / "tokenizer.json.partial").symlink_to(tmp_path / "profile")
    assert run_command("repair", folder, "--from", REPO, "-q")[0] == 0
    assert (tmp_path / "profile").read_text() == "mine"
    assert not (folder / "tokenizer.json").is_symlink()
