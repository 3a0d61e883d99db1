"""Fixtures that many tests use: the example model and its conversions, each made once a run."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from hub_server import HubServer
from project_paths import EXAMPLE, SUPPORT

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Small matrices on few cores: torch's workers spin longer than they compute, and stall when another
# job runs.
torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    """Escape lone surrogates in captured output: pytest-xdist sends reports as UTF-8."""
    report = yield
    report.sections = [
        (title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections
    ]
    return report


@pytest.fixture(scope="session")
def example_folder() -> Path:
    """Folder of the example checkpoint in the repository. Tests only read it."""
    return EXAMPLE


@pytest.fixture(scope="session")
def shared_folder(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Callable[[str, Callable[[Path], object]], Path]:
    """Function (name, make) -> folder that make(folder) filled once for all workers of this run.

    make runs in one process; the others wait for it at a file lock. Tests only read the folder.
    """
    root = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        # A worker's folder lies in the run's.
        root = root.parent
    root = root / "shared"
    (root / "partial").mkdir(parents=True, exist_ok=True)

    def shared(name: str, make: Callable[[Path], object]) -> Path:
        folder = root / name
        with FileLock(root / f"{name}.lock"):
            if not folder.exists():
                partial = root / "partial" / name
                shutil.rmtree(partial, ignore_errors=True)
                make(partial)
                partial.rename(folder)
        return folder

    return shared


@pytest.fixture(scope="session")
def source(shared_folder: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """Small checkpoint of three layers in two shards. Tests only read it."""
    from make_checkpoint import SHAPES, make_checkpoint

    return shared_folder(
        "mini", lambda folder: make_checkpoint(folder, SHAPES["mini"], 3, shards=2)
    )


@pytest.fixture(scope="session")
def converted(
    shared_folder: Callable[[str, Callable[[Path], object]], Path],
) -> Callable[[str], Path]:
    """Function recipe name -> folder of the converted example. Tests only read it."""
    from converter.convert import convert_checkpoint
    from converter.recipe.recipes import make_recipe

    def folder_of(recipe: str = "2bit") -> Path:
        return shared_folder(
            recipe,
            lambda folder: convert_checkpoint(EXAMPLE, folder, make_recipe(recipe, solver="hqq")),
        )

    return folder_of


@pytest.fixture
def converted_copy(converted: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the example at 2 bits, to be broken."""
    return Path(shutil.copytree(converted("2bit"), tmp_path / "copy"))


@pytest.fixture
def templated(converted_copy: Path) -> Path:
    """A copy of the example at 2 bits with the chat template templates/instruct.jinja.

    Open it with check="none": its index lists the tokenizer without the template.
    """
    config = converted_copy / "tokenizer_config.json"
    template = (SUPPORT / "serving" / "templates" / "instruct.jinja").read_text()
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
    """Let SIGINT interrupt this process and its children.

    A shell ignores SIGINT in background scripts, and children inherit that.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on the loopback interface, with an empty cache; huggingface_hub in this process uses
    it.
    """
    with HubServer() as server:
        server.connect(tmp_path / "hf-home", monkeypatch)
        yield server
