"""download as a user calls it: everything, a part, damage."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer

from formats.artifact import Artifact

REPO = "me/tiny-2bit"
Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def filled(hub: HubServer, converted: Callable[[str], Path]) -> HubServer:
    hub.add(REPO, converted("2bit"))
    return hub


@pytest.fixture
def run(run_command: Callable[..., tuple[int, str, str]]) -> Run:
    def call(*args: object) -> tuple[int, dict[str, Any]]:
        code, out, _ = run_command("download", *args, "--json", "-q")
        return code, json.loads(out) if out else {}

    return call


def test_what_is_downloaded_is_the_folder(
    filled: HubServer, run: Run, converted: Callable[[str], Path]
) -> None:
    code, facts = run(REPO)
    assert code == 0
    assert facts["ok"]
    assert Path(facts["folder"]).name == filled.head(REPO).oid
    assert Artifact.open(facts["folder"]).index == Artifact.open(converted("2bit")).index


def test_a_second_download_fetches_nothing(filled: HubServer, run: Run) -> None:
    run(REPO)
    filled.requests.clear()
    assert run(REPO)[0] == 0
    assert filled.served() == 0


def test_a_local_folder_gets_plain_files(filled: HubServer, run: Run, tmp_path: Path) -> None:
    code, facts = run(REPO, "--local-dir", tmp_path / "here")
    assert code == 0
    assert facts["folder"] == str(tmp_path / "here")
    assert not (tmp_path / "here/trunk.safetensors").is_symlink()
    assert Artifact.open(tmp_path / "here")


def test_only_what_is_included_is_fetched(filled: HubServer, run: Run) -> None:
    code, facts = run(REPO, "--include", "*.json", "--include", "experts/layer-000*")
    assert code == 0
    assert not any("layer-001" in r.path for r in filled.requests)
    assert facts["files"] == sum(n.endswith(".json") for n in filled.head(REPO).files) + 1


def test_a_revision_is_fetched(filled: HubServer, run: Run) -> None:
    old = filled.head(REPO).oid
    filled.commit(REPO, {"trunk.safetensors": b"other"})
    assert run(REPO, "--revision", old) == (0, run(REPO, "--revision", old)[1])
    assert run(REPO)[0] == 3


@pytest.mark.parametrize("include", [[], ["--include", "experts/*"]])
def test_damage_on_the_way_is_found(filled: HubServer, run: Run, include: list[str]) -> None:
    filled.faults.damage("layer-001", at=50_000)
    code, facts = run(REPO, *include)
    assert code == 3
    assert any("layer-001" in problem for problem in facts["problems"])


@pytest.mark.parametrize("fault", ["drop", "short"])
def test_a_bad_line_is_got_over(
    filled: HubServer, run: Run, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda s: None)
    getattr(filled.faults, fault)("layer-001")
    filled.faults.status(503, "layer-002", Retry_After="1")
    assert run(REPO)[0] == 0


def test_what_is_not_there_is_an_error(filled: HubServer, run: Run) -> None:
    assert run("me/nothing")[0] == 1
    assert run("no-repository")[0] == 1
