"""A stranger follows the card of a published model: each line as it stands prints text."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from card_lines import FreshShell, Reader, SameProcess, lines_of
from hub_server import HubServer
from project_paths import ROOT, SUPPORT
from random_models import write_checkpoint

from converter.convert import convert_checkpoint
from converter.publish.hub_commit import PublishOptions, publish_folder
from converter.recipe.recipes import make_recipe
from formats.install import INSTALL, INSTALL_TORCH_FOR_CPU, install_extra

REPO = "me/tiny-2bit"
Publish = Callable[..., str]


@pytest.fixture
def publish(hub: HubServer) -> Publish:
    """Function (folder, options) -> the text of the card in the repository."""

    def card(folder: Path, **options: str) -> str:
        publish_folder(folder, PublishOptions(REPO, **{"license": "mit", **options}))
        files = hub.files(REPO, options.get("revision", "main"))
        return files["README.md"].decode()

    return card


def run_lines(card: str, reader: Reader) -> None:
    """Run the lines to generate, of Python and to chat; each must print text."""
    (generate,) = lines_of(card, "Generate text")
    assert reader.shell(generate).strip()
    assert reader.python("\n".join(lines_of(card, "Python"))).strip()
    (plan,) = lines_of(card, "Memory")
    assert "tokens/s" in reader.shell(plan)
    chat, _, _ = lines_of(card, "Chat")
    assert reader.shell(chat, "So Jonah arose\n").strip()


@pytest.fixture
def fresh(hub: HubServer, tmp_path: Path) -> Reader:
    """A reader with an empty folder, whose every line is a process of its own."""
    return FreshShell.of(hub, tmp_path / "reader")


@pytest.fixture
def quick(
    hub: HubServer,
    tmp_path: Path,
    run_command: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Reader:
    """A reader with an empty folder, whose lines run in this process."""
    folder = tmp_path / "reader"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return SameProcess(folder, run_command, monkeypatch, capsys)


@pytest.mark.parametrize("section", ["Generate text", "Python", "Chat"])
def test_lines_of_a_published_model_print_text(
    publish: Publish, converted: Callable[[str], Path], fresh: Reader, section: str
) -> None:
    lines = lines_of(publish(converted("2bit")), section)
    assert any(REPO in line for line in lines)
    if section == "Python":
        assert fresh.python("\n".join(lines)).strip()
    else:
        assert fresh.shell(lines[0], "So Jonah arose\n").strip()


def test_lines_of_a_chat_model_print_an_answer(
    publish: Publish, example_folder: Path, tmp_path: Path, quick: Reader
) -> None:
    source = Path(shutil.copytree(example_folder, tmp_path / "source"))
    template = SUPPORT / "serving" / "templates" / "instruct.jinja"
    shutil.copy(template, source / "chat_template.jinja")
    out = tmp_path / "out"
    convert_checkpoint(source, out, make_recipe("2bit", solver="hqq"))
    card = publish(out)
    assert "apply_chat_template" in card
    assert "no chat template" not in card
    run_lines(card, quick)


@pytest.mark.parametrize("name", ["olmoe", "qwen3_moe with dense layers"])
def test_lines_of_another_model_type_print_text(
    publish: Publish, example_folder: Path, tmp_path: Path, quick: Reader, name: str
) -> None:
    source = write_checkpoint(tmp_path / "source", name, fused=False, vocab_size=4096)
    for file in example_folder.glob("*token*"):
        shutil.copy(file, source)
    out = tmp_path / "out"
    convert_checkpoint(source, out, make_recipe("2bit", calibrate="none"))
    run_lines(publish(out), quick)


def test_lines_of_a_folder_run_in_the_folder(
    hub: HubServer, converted: Callable[[str], Path], quick: Reader
) -> None:
    shutil.copytree(converted("16bit"), quick.folder, dirs_exist_ok=True)
    card = (quick.folder / "README.md").read_text()
    run_lines(card, quick)
    assert not hub.requests


def test_lines_of_a_branch_load_that_branch(
    hub: HubServer, publish: Publish, converted: Callable[[str], Path], quick: Reader
) -> None:
    card = publish(converted("2bit"), revision="two-bits")
    assert "moe_index.json" not in hub.files(REPO)
    run_lines(card, quick)


def test_install_lines_are_those_of_the_software(
    publish: Publish, converted: Callable[[str], Path]
) -> None:
    card = publish(converted("2bit"))
    assert lines_of(card, "Install") == [INSTALL_TORCH_FOR_CPU, INSTALL]
    assert lines_of(card, "Chat")[1] == install_extra("serve")


def test_line_of_the_server_starts_one(
    publish: Publish, converted: Callable[[str], Path], quick: Reader
) -> None:
    card = publish(converted("2bit"))
    serve = lines_of(card, "Chat")[2]
    # A line of the card cannot end a server; its help must at least accept the line.
    assert "--host" in quick.shell(f"{serve} --help")
    assert serve == f"moe-convert serve {REPO}"


def test_lines_that_measure_a_model_do(
    publish: Publish, converted: Callable[[str], Path], example_folder: Path, quick: Reader
) -> None:
    card = publish(converted("2bit"))
    (quick.folder / "original").symlink_to(example_folder)
    text = (ROOT / "examples" / "text" / "english.txt").read_text()[:2000]
    (quick.folder / "my-text.txt").write_text(text)
    download, measure = lines_of(card, "Quality")
    quick.shell(download)
    value = json.loads(quick.shell(f"{measure} --json"))
    assert value["overall"]["kl"] > 0


def test_command_that_made_a_model_makes_it_again(
    hub: HubServer, publish: Publish, example_folder: Path, quick: Reader
) -> None:
    hub.add("me/tiny", example_folder)
    first = "moe-convert convert me/tiny -o first --bits 3 --solver hqq --codec zstd"
    quick.shell(first)
    card = publish(quick.folder / "first")
    (line,) = lines_of(card, "Recipe")
    quick.shell(f"{line} -o second")
    first_index, second_index = (
        (quick.folder / name / "moe_index.json").read_bytes() for name in ("first", "second")
    )
    assert first_index == second_index
