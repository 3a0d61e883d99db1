"""`moe-convert cache`, and lazy loading from a complete Hub cache."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import HubServer
from lazy_repository import REPO, expert_bytes, filled, generate, local, open_lazy

import loader
from formats.hub.hub_settings import KERNELS_FOLDER, cache_root, kept_root

Run = Callable[..., tuple[int, str, str]]
_ = filled, local


def listed(run_command: Run, *options: str) -> list[dict[str, object]]:
    code, out, err = run_command("cache", *options, "--json")
    assert code == 0, err
    models: list[dict[str, object]] = json.loads(out)["models"]
    return models


def test_an_empty_cache_is_said(hub: HubServer, run_command: Run) -> None:
    code, out, _ = run_command("cache")
    assert (code, out) == (0, f"0 B in {kept_root()}\n")


def test_a_part_of_a_model_is_listed_and_removed(filled: HubServer, run_command: Run) -> None:
    folder = open_lazy()
    folder.close()
    (kept_root() / KERNELS_FOLDER).mkdir()
    (kept_root() / KERNELS_FOLDER / "x.cubin").write_bytes(bytes(5000))
    kernels, model = listed(run_command)
    assert (kernels["name"], kernels["bytes"]) == ("GPU kernels", 8192)
    assert (model["name"], model["commit"], model["state"]) == (REPO, folder.path.name, "0 experts")
    trunk = folder.artifact.index.trunk.size_bytes
    assert trunk < int(str(model["bytes"])) < trunk + (4 << 20)
    code, out, _ = run_command("cache")
    assert code == 0
    assert f"{REPO}" in out and folder.path.name[:12] in out
    assert [m["name"] for m in listed(run_command, "--remove", REPO)] == [REPO]
    assert [m["name"] for m in listed(run_command)] == ["GPU kernels"]
    assert not (kept_root() / REPO.replace("/", "--")).exists()


def test_clear_removes_everything(filled: HubServer, run_command: Run) -> None:
    open_lazy().close()
    (kept_root() / KERNELS_FOLDER).mkdir()
    assert len(listed(run_command, "--clear")) == 2
    assert listed(run_command) == []
    assert open_lazy().has(0, 0) is False


def test_links_and_other_folders_stay(filled: HubServer, run_command: Run, tmp_path: Path) -> None:
    open_lazy().close()
    owner = kept_root() / REPO.replace("/", "--")
    kept = tmp_path / "precious"
    kept.mkdir()
    (kept / "file").write_text("x")
    (owner / ("0" * 40)).symlink_to(kept)
    (owner / "notes").mkdir()
    assert len(listed(run_command)) == 1
    listed(run_command, "--clear")
    assert (kept / "file").read_text() == "x"


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["--remove", "no/model"], 1, "has no model no/model"),
        (["--remove", REPO, "--clear"], 2, "not both"),
    ],
)
def test_wrong_use_is_refused(
    filled: HubServer, run_command: Run, options: list[str], code: int, text: str
) -> None:
    open_lazy().close()
    found = run_command("cache", *options)
    assert found[0] == code
    assert text in found[2]
    assert len(listed(run_command)) == 1


def test_a_complete_hub_cache_is_used_and_no_copy_is_written(
    filled: HubServer, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = generate(REPO)
    sent = filled.served("experts/")
    assert sent >= expert_bytes(local)
    assert generate(REPO, lazy=True) == wanted
    assert filled.served("experts/") == sent
    assert not kept_root().exists()
    model = loader.from_pretrained(REPO, kernels="torch", lazy=True)
    assert Path(model.name_or_path).is_relative_to(cache_root())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert generate(REPO, lazy=True) == wanted


@pytest.mark.parametrize("revision", [None, "a/branch"])
def test_a_downloaded_model_is_found_offline_by_its_revisions_name(
    filled: HubServer, local: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None
) -> None:
    if revision:
        filled.commit(REPO, {"README.md": b"x"}, revision)
        filled.commit(REPO, filled.files(REPO), revision)
    folder = Path(loader.from_pretrained(REPO, kernels="torch", revision=revision).name_or_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    filled.requests.clear()
    model = loader.from_pretrained(REPO, kernels="torch", revision=revision)
    assert Path(model.name_or_path) == folder
    assert filled.requests == []


def test_a_cache_that_cannot_be_written_is_still_read(
    filled: HubServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(loader.from_pretrained(REPO, kernels="torch").name_or_path)
    refs = folder.parent.parent / "refs"
    (refs / "main").unlink()
    refs.rmdir()
    refs.write_text("a file where a folder must be")
    caplog.set_level("INFO")
    assert Path(loader.from_pretrained(REPO, kernels="torch").name_or_path) == folder
    assert "cannot be found offline by main" in caplog.text


def test_an_incomplete_hub_cache_is_not_used(filled: HubServer) -> None:
    folder = Path(loader.from_pretrained(REPO, kernels="torch").name_or_path)
    layer = next(folder.glob("experts/layer-*"))
    layer.resolve().unlink()
    lazy = open_lazy()
    assert lazy.path.is_relative_to(kept_root())
    assert not lazy.complete
