"""A converted model on the Hub, described from its index and headers alone."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import HubServer

from converter.cli.main import main
from formats.artifact import Artifact
from formats.errors import DamageError, FormatError, NotConvertedError
from formats.hub.ranges import Retries
from formats.hub.remote_artifact import open_remote
from formats.hub.repo import HubRepo

REPO = "me/tiny-2bit"


@pytest.fixture
def folder(converted: Callable[[str], Path]) -> Path:
    return converted("2bit")


@pytest.fixture
def filled(hub: HubServer, folder: Path) -> HubServer:
    hub.add(REPO, folder)
    return hub


def open_repo() -> HubRepo:
    return HubRepo.open(REPO, retries=Retries(attempts=2, wait=lambda s: None))


def inspect(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, object]:
    with pytest.raises(SystemExit) as exit_:
        main(["inspect", *map(str, args), "--json", "--experts"])
    assert exit_.value.code == 0
    value: dict[str, object] = json.loads(capsys.readouterr().out)
    return value


def test_a_repository_is_inspected_like_its_folder(
    filled: HubServer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remote, local = inspect(capsys, REPO), inspect(capsys, folder)
    assert remote.pop("repository") == f"{REPO}@{filled.head(REPO).oid}"
    assert remote == local


def test_only_index_and_headers_are_fetched(
    filled: HubServer, folder: Path, tmp_path: Path
) -> None:
    artifact = open_remote(open_repo(), tmp_path)
    assert artifact.index == Artifact.open(folder).index
    small = sum(
        (folder / name).stat().st_size for name in ("moe_index.json", "config.json", "quality.json")
    )
    headers = sum(
        artifact.index.layers[n].experts[0].offset for n in range(len(artifact.index.layers))
    )
    assert filled.served(REPO) <= small + headers + artifact.trunk_header().data_offset + 4096
    allocated = sum(p.stat().st_blocks * 512 for p in tmp_path.rglob("*"))
    assert allocated < sum(p.stat().st_size for p in tmp_path.rglob("*")) / 4


def test_a_revision_is_inspected(
    filled: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = filled.head(REPO).oid
    filled.commit(REPO, {"moe_index.json": b"{}"})
    assert inspect(capsys, REPO, "--revision", old)["repository"] == f"{REPO}@{old}"
    with pytest.raises(FormatError, match="moe-convert"):
        open_remote(open_repo(), tmp_path)


def test_a_name_in_the_index_that_leaves_the_folder_is_refused(
    filled: HubServer, folder: Path, tmp_path: Path
) -> None:
    data = (
        (folder / "moe_index.json")
        .read_text()
        .replace("experts/layer-000.safetensors", "../layer-000.safetensors")
    )
    filled.commit(REPO, {"moe_index.json": data.encode()})
    with pytest.raises(Exception, match=r"layers\[0\]\.file is '\.\./layer-000"):
        open_remote(open_repo(), tmp_path / "in")
    assert not (tmp_path / "layer-000.safetensors").exists()


def test_a_layer_of_another_size_is_refused(filled: HubServer, tmp_path: Path) -> None:
    filled.commit(REPO, {"experts/layer-000.safetensors": bytes(100)})
    with pytest.raises(DamageError, match="100 bytes, the index says"):
        open_remote(open_repo(), tmp_path)


@pytest.mark.parametrize("name", ["moe_index.json", "config.json", "experts/layer-001.safetensors"])
def test_damage_on_the_way_is_found(filled: HubServer, tmp_path: Path, name: str) -> None:
    filled.faults.damage(name, at=20)
    with pytest.raises(FormatError, match=name.rpartition("/")[2]):
        open_remote(open_repo(), tmp_path)


@pytest.mark.parametrize("fault", ["drop", "short", "ignore_range", "shift"])
def test_a_bad_line_is_got_over(
    filled: HubServer, folder: Path, tmp_path: Path, fault: str
) -> None:
    for name in open_repo().files:
        getattr(filled.faults, fault)(name)
    assert open_remote(open_repo(), tmp_path).index == Artifact.open(folder).index


def test_a_repository_without_an_index_is_no_converted_model(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.add(REPO, {"config.json": b"{}"})
    with pytest.raises(NotConvertedError, match=r"no moe_index\.json"):
        open_remote(open_repo(), tmp_path)
