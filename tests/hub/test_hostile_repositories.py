"""Repositories that would exhaust disk, bandwidth or memory: refused after the index, before any
large file.
"""

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from architectures import architecture_of, shape_of
from bad_folders import copy_of_good
from hub_repos import Blob
from hub_server import HubServer
from msgspec.structs import replace as msgspec_replace

from converter.checkpoint.shards.hub_model import HubModel
from converter.checkpoint.source import Checkpoint
from converter.checkpoint.source_tensors import stored_tensors
from formats.artifact import Artifact
from formats.errors import (
    DamageError,
    DoesNotFitError,
    FormatError,
    HubError,
    MoeConvertError,
    SourceError,
)
from formats.expert import ExpertLayout
from formats.hub.hub_origin import HubOrigin
from formats.hub.lazy_folder import LazyFolder
from formats.hub.ranges import Retries
from formats.hub.remote_artifact import open_remote
from formats.hub.repo import HubRepo
from formats.hub.repo_listing import fetch_listed
from formats.hub.revision_files import MAX_FILES
from formats.index_checks import index_problems, layer_header_limit
from formats.layer_file import layer_metadata, raw_entries
from formats.safetensors_header import MAX_HEADER_BYTES, TensorEntry, build_header, max_header_bytes
from loader.repository import open_model, small_files

REPO = "me/tiny"
QUICK = Retries(attempts=2, wait=lambda s: None)
LAYER = "experts/layer-000.safetensors"

OPENERS: dict[str, Callable[[Path], object]] = {
    "inspect and plan": lambda folder: open_remote(opened(), folder),
    "from_pretrained": lambda folder: open_model(REPO, None, None, lazy=False, progress=None),
    "lazy": lambda folder: LazyFolder.open(REPO, retries=QUICK),
    "load_tokenizer": lambda folder: small_files(REPO, None, None),
    "download": lambda folder: fetch_listed(
        opened(), beside=("README.md", "quality.json"), local_dir=folder
    ),
}
every_way = pytest.mark.parametrize("way", OPENERS)


def opened() -> HubRepo:
    return HubRepo.open(REPO, retries=QUICK)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_of_good(tmp_path)


@pytest.fixture
def refused(hub: HubServer, folder: Path, tmp_path: Path) -> Callable[..., str]:
    """Open the repository, check that it is refused after its index alone; return the message."""

    def refuse(way: str, error: type[MoeConvertError], *, also: tuple[str, ...] = ()) -> str:
        hub.requests.clear()
        with pytest.raises(error) as caught:
            OPENERS[way](tmp_path / "opened")
        asked = {
            r.path.partition(hub.head(REPO).oid)[2][1:]
            for r in hub.requests
            if "/resolve/" in r.path
        }
        assert asked <= {"moe_index.json", *also}
        assert hub.served() < 100_000
        assert caught.value.hint
        return caught.value.message

    return refuse


def set_layers(index: Any, count: int) -> None:
    """Change index and config.json to `count` layers."""
    index["config"]["num_hidden_layers"] = count
    modules = [f"model.layers.{layer}.mlp.experts" for layer in range(count)]
    index["architecture"] |= {"num_hidden_layers": count, "expert_modules": modules}


def edit_index(folder: Path, change: Callable[[Any], None], name: str = "moe_index.json") -> None:
    index = json.loads((folder / name).read_text())
    change(index)
    (folder / name).write_text(json.dumps(index))


def declare_size(hub: HubServer, name: str, size: int, repo: str = REPO) -> None:
    """Let the Hub report a size too large to fetch for a file."""
    files = hub.head(repo).files
    content = files[name].content if name in files else b"{}"
    files[name] = replace(Blob.of(content, name), lfs=True, size=size)


@every_way
def test_files_that_the_index_does_not_list_are_never_fetched(
    hub: HubServer, folder: Path, way: str
) -> None:
    unlisted = [
        "payload.bin",
        "model.safetensors",
        "tokenizer.json",
        "images/a.png",
        "custom_generate/generate.py",
    ]
    hub.add(REPO, {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()})
    hub.commit(REPO, {name: bytes(2 << 20) for name in unlisted})
    OPENERS[way](folder.parent / "opened")
    assert not [r.path for r in hub.requests if any(name in r.path for name in unlisted)]
    assert hub.served() < 200_000


@every_way
def test_thousands_of_layers_of_one_file_are_refused_by_their_count(
    hub: HubServer, folder: Path, way: str
) -> None:
    def thousands(index: Any) -> None:
        index["layers"] *= 3000

    edit_index(folder, thousands)
    hub.add(REPO, folder)
    hub.requests.clear()
    with pytest.raises(FormatError, match=r"layers has 3000 entries, expert_modules has 1"):
        OPENERS[way](folder.parent / "opened")
    assert (
        hub.served() == hub.served("moe_index.json") == (folder / "moe_index.json").stat().st_size
    )


@every_way
def test_layers_that_name_one_file_are_refused_before_its_header(
    hub: HubServer, folder: Path, refused: Callable[..., str], way: str
) -> None:
    def many(index: Any) -> None:
        index["layers"] *= 20
        set_layers(index, 20)

    edit_index(folder, many)
    hub.add(REPO, folder)
    assert "layers[1].file is 'experts/layer-000.safetensors'" in refused(way, FormatError)


def test_a_count_that_config_json_does_not_have_is_refused_before_a_header(
    hub: HubServer, folder: Path, refused: Callable[..., str]
) -> None:
    def many(index: Any) -> None:
        set_layers(index, 3)
        first = index["layers"][0]
        for n in (1, 2):
            experts = [{**expert, "layer": n} for expert in first["experts"]]
            index["layers"].append(
                {**first, "file": f"experts/layer-00{n}.safetensors", "experts": experts}
            )

    edit_index(folder, many)
    for n in (1, 2):
        shutil.copyfile(folder / LAYER, folder / f"experts/layer-00{n}.safetensors")
    hub.add(REPO, folder)
    for way in ("inspect and plan", "lazy"):
        assert "num_hidden_layers is 1" in refused(way, FormatError, also=("config.json",))


@every_way
def test_an_index_with_a_header_of_a_hundred_megabytes_is_refused(
    hub: HubServer, folder: Path, refused: Callable[..., str], way: str
) -> None:
    def shift(index: Any) -> None:
        index["layers"][0]["size_bytes"] += 90 << 20
        for expert in index["layers"][0]["experts"]:
            expert["offset"] += 90 << 20

    edit_index(folder, shift)
    hub.add(REPO, folder)
    declare_size(hub, LAYER, (folder / LAYER).stat().st_size + (90 << 20))
    assert "layers[0].experts[0].offset is 94375936, the limit is 69632" in refused(
        way, FormatError
    )


@pytest.mark.parametrize("way", ["inspect and plan", "lazy"])
@pytest.mark.parametrize("name", ["trunk.safetensors", LAYER])
def test_a_header_that_is_longer_than_its_tensors_need_is_not_fetched(
    hub: HubServer, folder: Path, way: str, name: str
) -> None:
    with open(folder / name, "r+b") as f:
        f.write(struct.pack("<Q", 89_000_000))
    hub.add(REPO, folder)
    declare_size(hub, name, (folder / name).stat().st_size)
    hub.requests.clear()
    with pytest.raises(FormatError, match="header of 89000000 bytes, the limit is"):
        OPENERS[way](folder.parent / "opened")
    assert hub.served(name) <= 4096
    with pytest.raises(FormatError, match="header of 89000000 bytes, the limit is"):
        Artifact.open(folder)


@every_way
@pytest.mark.parametrize("name", ["trunk.safetensors", LAYER])
def test_weights_of_another_size_than_the_index_says_are_not_fetched(
    hub: HubServer, folder: Path, refused: Callable[..., str], way: str, name: str
) -> None:
    hub.add(REPO, folder)
    declare_size(hub, name, 1 << 40)
    assert f"{name} has 1099511627776 bytes, the index says" in refused(way, DamageError)


@every_way
@pytest.mark.parametrize("name", ["moe_index.json", "config.json", "LICENSE"])
def test_a_small_file_of_a_terabyte_is_not_fetched(
    hub: HubServer, folder: Path, refused: Callable[..., str], way: str, name: str
) -> None:
    hub.add(REPO, folder)
    declare_size(hub, name, 1 << 40)
    message = refused(way, DamageError)
    assert name in message
    assert "1099511627776 bytes, the limit is" in message


@pytest.mark.parametrize(
    ("way", "name"), [("inspect and plan", "quality.json"), ("download", "README.md")]
)
def test_a_large_file_beside_the_index_is_not_fetched(
    hub: HubServer, folder: Path, refused: Callable[..., str], way: str, name: str
) -> None:
    hub.add(REPO, folder)
    declare_size(hub, name, 1 << 40)
    assert "1099511627776 bytes, the limit is" in refused(way, DamageError, also=("config.json",))


@every_way
def test_a_name_that_the_index_has_twice_is_refused(
    hub: HubServer, folder: Path, refused: Callable[..., str], way: str
) -> None:
    edit_index(folder, lambda index: index["files"].extend(index["files"]))
    hub.add(REPO, folder)
    assert "field files has 'license' 2 times" in refused(way, FormatError)


def test_more_small_files_or_larger_ones_than_a_model_has_are_refused(folder: Path) -> None:
    (entry,) = json.loads((folder / "moe_index.json").read_text())["files"]
    edit_index(
        folder,
        lambda index: index.update(files=[entry | {"file": f"LICENSE.{n}"} for n in range(1001)]),
    )
    with pytest.raises(FormatError, match=r"length <= 1000.*files"):
        Artifact.open(folder)
    edit_index(folder, lambda index: index.update(files=[entry | {"size_bytes": (256 << 20) + 1}]))
    with pytest.raises(FormatError, match=r"<= 268435456.*files\[0\]\.size_bytes"):
        Artifact.open(folder)


@pytest.mark.parametrize("way", ["from_pretrained", "download"])
def test_a_disk_without_room_is_named_before_the_weights_come(
    hub: HubServer,
    folder: Path,
    refused: Callable[..., str],
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.add(REPO, folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    needed = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert f"needs {needed} bytes, only 1 are free" in refused(way, DoesNotFitError)


def test_a_repository_of_too_many_files_is_refused(
    hub: HubServer, folder: Path, refused: Callable[..., str]
) -> None:
    hub.add(REPO, folder)
    blob = Blob.of(b"", "x")
    hub.head(REPO).files.update({f"x{n}": blob for n in range(MAX_FILES)})
    assert f"files, the limit is {MAX_FILES}" in refused("inspect and plan", HubError)


@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "/etc/x", "a\\x", "a//x", "x\x1b[2J", "\u202ex"]
)
def test_a_file_that_a_hub_may_not_list_is_refused(
    hub: HubServer, folder: Path, refused: Callable[..., str], name: str
) -> None:
    hub.add(REPO, folder)
    hub.head(REPO).files[name] = Blob.of(b"", "x")
    assert "the Hub lists a file" in refused("from_pretrained", HubError)


def test_a_repair_takes_no_more_bytes_than_the_expert_has(hub: HubServer, folder: Path) -> None:
    index = Artifact.open(folder).index
    edit_index(folder, lambda value: value["layers"][0]["experts"][0].update(length=1 << 39))
    hub.add(REPO, folder)
    declare_size(hub, LAYER, 1 << 40)
    origin = HubOrigin(opened())
    hub.requests.clear()
    with pytest.raises(DamageError, match="differs from the folder's"):
        origin.expert(index.layers[0].experts[0])
    declare_size(hub, "trunk.safetensors", 1 << 40)
    with pytest.raises(DamageError, match="its sha256 is"):
        HubOrigin(opened()).file("trunk.safetensors", "0" * 64, folder / "new")
    assert hub.served("safetensors") == 0


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors.index.json"])
def test_a_small_file_of_a_terabyte_beside_a_checkpoint_is_not_fetched(
    hub: HubServer, source: Path, name: str
) -> None:
    hub.add(REPO, source)
    declare_size(hub, name, 1 << 40)
    with pytest.raises(SourceError, match=f"{name} has 1099511627776 bytes, the limit is"):
        HubModel.open(REPO)
    assert hub.served() == 0


def test_the_header_of_a_checkpoints_shard_is_bounded_by_its_tensors(
    hub: HubServer, source: Path
) -> None:
    hub.add(REPO, source)
    name = "model-00001-of-00002.safetensors"
    hub.commit(REPO, {name: struct.pack("<Q", 89_000_000) + bytes(1 << 20)})
    declare_size(hub, name, 1 << 30)
    hub.requests.clear()
    with pytest.raises(SourceError, match="header of 89000000 bytes, the limit is"):
        Checkpoint(HubModel.open(REPO))
    assert hub.served(name) <= 1 << 16


def test_more_shards_than_tensors_are_refused(source: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "source"))

    def many(index: Any) -> None:
        index["weight_map"] |= {f"x{n}": f"shard-{n}.safetensors" for n in range(5000)}

    edit_index(folder, many, "model.safetensors.index.json")
    with pytest.raises(SourceError, match=r"5002 shards, of a model with \d+ tensors"):
        Checkpoint(folder)


LARGE: dict[str, Any] = {
    "model_type": "mixtral",
    "hidden_size": 7168,
    "intermediate_size": 2048,
    "num_hidden_layers": 60,
    "num_local_experts": 512,
    "num_experts_per_tok": 8,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "head_dim": 128,
    "vocab_size": 129280,
}


def test_the_headers_of_a_checkpoint_with_512_experts_a_layer_are_within_their_limit() -> None:
    shape = LARGE["intermediate_size"], LARGE["hidden_size"]
    size = 2 * shape[0] * shape[1]
    prefix = "base_model.model.model.layers.59.block_sparse_moe.experts"
    names = [
        f"{prefix}.{expert}.{part}.weight" for expert in range(512) for part in ("w1", "w2", "w3")
    ]
    entries = [
        TensorEntry(name, "BF16", shape, n * size, (n + 1) * size)
        for n, name in enumerate(names, 90_000)
    ]
    one_layer = shape_of({**LARGE, "num_hidden_layers": 1})
    assert len(build_header(entries, {})) < max_header_bytes(stored_tensors(one_layer), 0)
    assert max_header_bytes(stored_tensors(shape_of(LARGE))) < MAX_HEADER_BYTES


@pytest.mark.parametrize("packing", ["tile32-q2-g16-s4", "rows-bf16"])
def test_the_header_of_a_layer_with_512_experts_is_within_its_limit(
    folder: Path, packing: str
) -> None:
    architecture = architecture_of(LARGE)
    layouts = [
        ExpertLayout.from_names(architecture, packing, packing)
    ] * architecture.num_local_experts
    module = architecture.expert_modules[59]
    header = build_header(raw_entries(module, layouts), layer_metadata(59, module, layouts, "none"))
    first = Artifact.open(folder).index.layers[0]
    assert len(header) < layer_header_limit(
        msgspec_replace(first, experts=first.experts[:1] * len(layouts))
    )


def test_the_index_of_a_good_folder_agrees_with_itself(folder: Path) -> None:
    assert list(index_problems(Artifact.open(folder).index, "index")) == []
