"""Repair restores damaged bytes exactly, and touches and fetches nothing else."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_folders import copy_of_good
from damaged_files import cut, flip
from hub_server import HubServer
from make_vectors import CONFIG, write_folder
from safetensors.torch import load_file, save_file

from formats.artifact import Artifact
from formats.errors import DamageError, FormatError, HubError, MoeConvertError
from formats.hub.hub_origin import HubOrigin
from formats.hub.ranges import Retries
from formats.hub.repo import HubRepo
from formats.index import read_index
from formats.reading.verify import verify_folder
from formats.repair.index_rebuild import rebuild_index
from formats.repair.repairs import NoOrigin, Repaired, repair_folder
from formats.safetensors_header import read_header

REPO = "me/tiny"
LAYER, LAYER_1 = "experts/layer-000.safetensors", "experts/layer-001.safetensors"
NOTHING = NoOrigin("give one")


def write(folder: Path, codec: str = "none") -> Path:
    packings = ("tile32-q2-g16-s8", "tile32-q3-g32-s4")
    return write_folder(
        folder,
        packings=packings,
        codec=codec,
        config={**CONFIG, "num_hidden_layers": 2, "num_local_experts": 3},
    )


@pytest.fixture(params=["none", "zstd"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write(tmp_path / "f", request.param)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def repair(folder: Path, **options: str) -> Repaired:
    repo = HubRepo.open(REPO, retries=Retries(attempts=2, wait=lambda s: None), **options)
    return repair_folder(folder, read_index(folder), HubOrigin(repo))


def save_again(path: Path, metadata: dict[str, str] | None = None) -> None:
    """Save as a general tool does: another order, no alignment, and only the given metadata."""
    save_file(
        {name: t.clone() for name, t in sorted(load_file(path).items(), reverse=True)},
        path,
        metadata,
    )


def metadata_of(path: Path) -> dict[str, str]:
    with open(path, "rb") as f:
        return read_header(f.fileno(), str(path)).metadata


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_a_damaged_expert_comes_by_its_range_and_nothing_else(
    hub: HubServer, tmp_path: Path, codec: str
) -> None:
    folder = write(tmp_path / "f", codec)
    good = contents(folder)
    hub.add(REPO, contents(folder))
    entry = Artifact.open(folder).entry(1, 1)
    flip(folder / LAYER_1, entry.offset + 9)
    assert repair(folder) == Repaired([LAYER_1], [(1, 1)])
    assert contents(folder) == good
    assert hub.ranges("layer-") == [(entry.offset, entry.offset + entry.length)]


@pytest.mark.parametrize("name", [LAYER, "trunk.safetensors", "LICENSE"])
@pytest.mark.parametrize("damage", ["missing", "cut", "flip"])
def test_a_file_comes_back(hub: HubServer, tmp_path: Path, name: str, damage: str) -> None:
    folder = write(tmp_path / "f")
    good = contents(folder)
    hub.add(REPO, contents(folder))
    if damage == "missing":
        (folder / name).unlink()
    elif damage == "cut":
        cut(folder / name, 20)
    else:
        flip(folder / name, 10)
    assert repair(folder).files == [name]
    assert contents(folder) == good


def test_experts_before_a_cut_are_kept(hub: HubServer, tmp_path: Path) -> None:
    folder = write(tmp_path / "f")
    good = contents(folder)
    hub.add(REPO, contents(folder))
    entry = Artifact.open(folder).entry(0, 1)
    cut(folder / LAYER, entry.offset + entry.length)
    assert repair(folder).experts == [(0, 2)]
    assert contents(folder) == good


def test_header_and_fillers_need_no_origin(folder: Path) -> None:
    good = contents(folder)
    entry = Artifact.open(folder).entry(0, 0)
    flip(folder / LAYER, 100)
    (folder / LAYER_1).write_bytes(good[LAYER_1][:-1] + b"\7")
    assert entry.length % 4096
    index = read_index(folder)
    assert repair_folder(folder, index, NOTHING).experts == []
    assert contents(folder) == good


def test_a_file_that_was_saved_again_gets_its_layout_back(folder: Path) -> None:
    good = contents(folder)
    save_again(folder / LAYER)
    with pytest.raises(FormatError):
        Artifact.open(folder)
    assert repair_folder(folder, read_index(folder), NOTHING) == Repaired([LAYER], [])
    assert contents(folder) == good


def test_a_good_folder_is_not_written_to(folder: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert repair_folder(folder, read_index(folder), NOTHING) == Repaired([], [])
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_without_an_origin_damage_stays_and_is_named(folder: Path) -> None:
    flip(folder / LAYER, Artifact.open(folder).entry(0, 2).offset)
    before = contents(folder)
    with pytest.raises(DamageError, match="layer 0 expert 2"):
        repair_folder(folder, read_index(folder), NOTHING)
    assert contents(folder) == before


def test_an_expert_of_another_model_is_not_taken(hub: HubServer, tmp_path: Path) -> None:
    folder = write(tmp_path / "f")
    other = write_folder(
        tmp_path / "o", config={**CONFIG, "num_hidden_layers": 2, "num_local_experts": 3}
    )
    hub.add(REPO, other)
    flip(folder / LAYER, 4096)
    before = contents(folder)[LAYER]
    with pytest.raises(DamageError, match="layer 0 expert 0 differs from"):
        repair(folder)
    assert (folder / LAYER).read_bytes() == before


@pytest.mark.parametrize("fault", ["drop", "short", "shift", "ignore_range"])
def test_a_bad_line_is_got_over(hub: HubServer, tmp_path: Path, fault: str) -> None:
    folder = write(tmp_path / "f")
    good = contents(folder)
    hub.add(REPO, contents(folder))
    flip(folder / LAYER, 4096)
    getattr(hub.faults, fault)("layer-000")
    repair(folder)
    assert contents(folder) == good


def test_damage_on_the_way_is_not_taken(hub: HubServer, tmp_path: Path) -> None:
    folder = write(tmp_path / "f")
    hub.add(REPO, contents(folder))
    flip(folder / LAYER, 4096)
    hub.faults.damage("layer-000", at=5)
    before = contents(folder)[LAYER]
    with pytest.raises(DamageError, match="other bytes came"):
        repair(folder)
    assert (folder / LAYER).read_bytes() == before
    repair(folder)
    assert verify_folder(folder, read_data=True).problems == []


def test_a_broken_line_leaves_the_old_file(hub: HubServer, tmp_path: Path) -> None:
    folder = write(tmp_path / "f")
    hub.add(REPO, contents(folder))
    flip(folder / LAYER, 4096)
    hub.faults.status(503, "layer-000", times=-1)
    before = contents(folder)[LAYER]
    with pytest.raises(HubError):
        repair(folder)
    assert (folder / LAYER).read_bytes() == before


def test_the_hubs_cache_is_never_written_to(hub: HubServer, tmp_path: Path) -> None:
    hub.add(REPO, write(tmp_path / "f"))
    folder = HubRepo.open(REPO).snapshot()
    with pytest.raises(MoeConvertError, match="link into the Hub's cache"):
        repair_folder(folder, read_index(folder), NOTHING)


def spoil_index(folder: Path, change: Callable[[dict], None]) -> bytes:  # type: ignore[type-arg]
    path = folder / "moe_index.json"
    good = path.read_bytes()
    value = json.loads(good)
    change(value)
    path.write_text(json.dumps(value))
    return good


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.pop("layers"),
        lambda v: v["layers"][0]["experts"][1].update(offset=1),
        lambda v: v["layers"][1].update(header_sha256="0" * 64),
        lambda v: v.pop("trunk"),
        lambda v: v.update(trunk=7, packings=[], architecture=None),
    ],
)
def test_an_index_is_written_again(folder: Path, change: Callable[[dict], None]) -> None:  # type: ignore[type-arg]
    good = spoil_index(folder, change)
    rebuild_index(folder)
    assert (folder / "moe_index.json").read_bytes() == good
    assert verify_folder(folder, read_data=True).problems == []


@pytest.mark.parametrize("name", ["producer", "source", "recipe", "files"])
def test_what_only_the_index_has_is_named(folder: Path, name: str) -> None:
    spoil_index(folder, lambda v: v.pop(name))
    before = contents(folder)
    with pytest.raises(FormatError, match=f"has no {name}, and no other file says it"):
        rebuild_index(folder)
    assert contents(folder) == before


def test_without_any_index_a_rebuild_is_refused(folder: Path) -> None:
    (folder / "moe_index.json").unlink()
    with pytest.raises(FormatError, match="no other file says producer, source, recipe, files"):
        rebuild_index(folder)


def test_files_saved_again_with_their_metadata_get_an_index(folder: Path) -> None:
    good = contents(folder)
    for layer in (LAYER, LAYER_1):
        save_again(folder / layer, metadata_of(folder / layer))
    spoil_index(folder, lambda v: v.pop("layers"))
    rebuild_index(folder)
    assert contents(folder) == good


def test_files_saved_again_without_metadata_and_index_entries_are_refused(folder: Path) -> None:
    save_again(folder / LAYER)
    spoil_index(folder, lambda v: v.pop("layers"))
    with pytest.raises(FormatError, match="metadata lacks gate_up, down, codec"):
        rebuild_index(folder)


def test_a_damaged_expert_gets_no_new_hash(folder: Path) -> None:
    flip(folder / LAYER, Artifact.open(folder).entry(0, 1).offset)
    spoil_index(folder, lambda v: v.pop("trunk"))
    with pytest.raises(FormatError, match=r"layer 0 expert 1 at offset \d+: its sha256"):
        rebuild_index(folder)


def test_a_trunk_that_does_not_fit_leaves_the_index(tmp_path: Path) -> None:
    folder = copy_of_good(tmp_path)
    flip(folder / "trunk.safetensors", 60)
    before = (folder / "moe_index.json").read_bytes()
    with pytest.raises(MoeConvertError):
        rebuild_index(folder)
    assert (folder / "moe_index.json").read_bytes() == before
