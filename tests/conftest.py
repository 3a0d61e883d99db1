"""What many tests share: the example model, and its conversions, each made once a session."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from project_paths import EXAMPLE, SUPPORT

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Small matrices on few cores: torch's workers spin longer than they compute, and stall when another
# job runs.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def example_folder() -> Path:
    """The example checkpoint, as it is in the repository."""
    return EXAMPLE


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint of three layers in two shards. Tests only read it."""
    from make_checkpoint import SHAPES, make_checkpoint

    folder = tmp_path_factory.mktemp("source") / "mini"
    make_checkpoint(folder, SHAPES["mini"], 3, shards=2)
    return folder


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Recipe name -> folder of the converted example. Tests only read it."""
    from converter.convert import convert_checkpoint
    from converter.recipe.recipes import make_recipe

    root = tmp_path_factory.mktemp("converted")

    def folder_of(recipe: str = "2bit") -> Path:
        folder = root / recipe
        if not folder.exists():
            convert_checkpoint(EXAMPLE, folder, make_recipe(recipe, solver="hqq"))
        return folder

    return folder_of


@pytest.fixture
def converted_copy(converted: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the example at 2 bits, to be broken."""
    return Path(shutil.copytree(converted("2bit"), tmp_path / "copy"))


@pytest.fixture
def templated(converted_copy: Path) -> Path:
    """A copy of the example at 2 bits whose tokenizer has the chat template
    tests/support/templates/instruct.jinja; to be opened with check="none", as the index does not
    list it so.
    """
    config = converted_copy / "tokenizer_config.json"
    template = (SUPPORT / "templates" / "instruct.jinja").read_text()
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": template}))
    return converted_copy


@pytest.fixture
def run_command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs moe-convert in this process, with these arguments: exit code, stdout, stderr."""
    from converter.cli.main import main

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        return exit_.value.code, *capsys.readouterr()  # type: ignore[return-value]

    return call


@pytest.fixture
def sigint() -> Iterator[None]:
    """SIGINT interrupts this process and those that it starts, also where the tests run in the
    background of a script: a shell has it ignored there, which children inherit.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on the loopback interface that huggingface_hub in this process talks to, with an empty
    cache.
    """
    with HubServer() as server:
        server.connect(tmp_path / "hf-home", monkeypatch)
        yield server
