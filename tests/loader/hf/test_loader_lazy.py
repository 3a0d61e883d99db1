"""Models from the Hub: downloaded whole, or each expert when a token needs it."""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from forked import in_child, needs_fork
from hub_server import HubServer
from inside import inside

import loader
from converter.cli.main import main
from formats.artifact import Artifact
from formats.errors import (
    DamageError,
    DoesNotFitError,
    FormatError,
    HubError,
    NotConvertedError,
    RecipeError,
)
from formats.hub import lazy_folder
from formats.hub.lazy_folder import LazyFolder
from formats.hub.lazy_reader import HubReader
from formats.hub.ranges import Retries
from formats.reading.mmap_reader import MmapReader
from formats.reading.reader import aligned_bytes
from formats.reading.verify import verify_folder

REPO = "me/tiny-2bit"
PROMPT = "So Jonah arose, and went to Nineveh, according to"
QUICK = Retries(attempts=3, wait=lambda s: None)


@pytest.fixture
def local(converted: Callable[[str], Path]) -> Path:
    return converted("2bit")


@pytest.fixture
def filled(hub: HubServer, local: Path) -> HubServer:
    hub.add(REPO, local)
    return hub


@pytest.fixture
def expected(local: Path) -> Iterator[Callable[[int, int], torch.Tensor]]:
    with MmapReader(Artifact.open(local)) as reader:
        yield reader.read


def open_lazy() -> LazyFolder:
    return LazyFolder.open(REPO, retries=QUICK)


def experts_of(folder: Path) -> list[tuple[int, int]]:
    return [
        (e.layer, e.expert) for layer in Artifact.open(folder).index.layers for e in layer.experts
    ]


def generate(folder: object, **options: object) -> list[int]:
    model = loader.from_pretrained(folder, kernels="torch", **options)
    tokenizer = loader.load_tokenizer(model.name_or_path)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids: list[int] = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0].tolist()
    return ids


def expert_bytes(local: Path) -> int:
    return sum(e.length for layer in Artifact.open(local).index.layers for e in layer.experts)


def fetched(hub: HubServer) -> int:
    """Return the bytes of layer files that were sent, without headers."""
    return sum(end - begin for begin, end in hub.ranges("experts/layer-") if begin >= 4096)


def test_tokens_are_those_of_the_local_folder_and_no_expert_comes_twice(
    filled: HubServer, local: Path
) -> None:
    assert generate(REPO, lazy=True) == generate(local)
    assert 0 < fetched(filled) <= expert_bytes(local)


@pytest.mark.parametrize("recipe", ["2bit", "zstd"])
def test_experts_have_their_bytes_with_and_without_a_codec(
    hub: HubServer,
    local: Path,
    tmp_path: Path,
    recipe: str,
    expected: Callable[[int, int], torch.Tensor],
    example_folder: Path,
) -> None:
    folder = local
    if recipe == "zstd":
        from converter.convert import ConvertOptions, convert_checkpoint
        from converter.recipe.recipes import make_recipe

        folder = tmp_path / "zstd"
        convert_checkpoint(
            example_folder, folder, make_recipe("2bit", solver="hqq"), ConvertOptions(codec="zstd")
        )
    hub.add(REPO, folder)
    with HubReader(open_lazy(), fill=False) as reader:
        for key in experts_of(local):
            assert torch.equal(reader.read(*key), expected(*key))
        assert reader.fetched_bytes == expert_bytes(folder) == reader.status()[0]


def test_a_filled_folder_is_an_ordinary_one(filled: HubServer, local: Path) -> None:
    lazy = open_lazy()
    with HubReader(lazy, fill=False) as reader:
        for key in experts_of(local):
            reader.read(*key)
    assert verify_folder(lazy.path, read_data=True).problems == []
    assert Artifact.open(lazy.path).index == Artifact.open(local).index
    assert not [
        p for p in lazy.path.iterdir() if "partial" in p.name or p.name == lazy_folder.RECORD_NAME
    ]
    filled.requests.clear()
    assert generate(REPO, lazy=True, io="mmap") == generate(local)
    assert fetched(filled) == 0


def test_the_background_download_fetches_the_remaining_experts(
    filled: HubServer, local: Path
) -> None:
    lazy = open_lazy()
    calls: list[tuple[str, int, int]] = []
    reader = HubReader(lazy, progress=lambda *call: calls.append(call))
    # The filling thread ends only when it is told to, so wait until it has all experts.
    with inside(reader, "lock"):
        assert inside(reader, "lock").wait_for(
            lambda: len(inside(reader, "good")) == len(inside(reader, "entries")), timeout=120
        )
    reader.close()
    assert lazy.complete
    assert fetched(filled) == expert_bytes(local)
    assert calls[-1] == ("experts", expert_bytes(local), expert_bytes(local))


def test_an_expert_that_is_being_filled_is_waited_for_and_comes_once(
    filled: HubServer, expected: Callable[[int, int], torch.Tensor]
) -> None:
    lazy = open_lazy()
    asked, go_on = threading.Event(), threading.Event()
    filled.faults.before("layer-000", lambda: (asked.set(), go_on.wait(60)))
    filled.requests.clear()
    reader = HubReader(lazy)
    assert asked.wait(60)
    with ThreadPoolExecutor(1) as pool:
        blob = pool.submit(reader.read, 0, 0)
        with inside(reader, "lock"):
            assert inside(reader, "lock").wait_for(lambda: inside(reader, "awaited"), timeout=60)
        go_on.set()
        assert torch.equal(blob.result(60), expected(0, 0))
    reader.close()
    entry = reader.artifact.entry(0, 0)
    assert filled.ranges("layer-000").count((entry.offset, entry.offset + entry.length)) == 1
    assert not any(
        begin < entry.offset + entry.length for begin, _ in filled.ranges("layer-000")[1:]
    )


@needs_fork
def test_a_forked_child_fetches_its_experts_while_its_parent_fetches_the_rest(
    filled: HubServer, expected: Callable[[int, int], torch.Tensor]
) -> None:
    asked, go_on = threading.Event(), threading.Event()
    filled.faults.before("layer-000", lambda: (asked.set(), go_on.wait(60)))
    reader = HubReader(open_lazy())
    assert asked.wait(60)

    def child() -> bool:
        reader.start_anew()
        found = torch.equal(reader.read(0, 0), expected(0, 0)) and torch.equal(
            reader.read(3, 1), expected(3, 1)
        )
        reader.close()
        return found

    assert in_child(child) is True
    go_on.set()
    assert torch.equal(reader.read(0, 0), expected(0, 0))
    reader.close()


def test_a_reader_that_is_closed_while_the_hub_fails_asks_no_more(filled: HubServer) -> None:
    lazy = LazyFolder.open(REPO)
    asked = threading.Event()
    filled.faults.status(503, "layer-000", times=-1)
    filled.faults.before("layer-000", asked.set, times=-1)
    reader = HubReader(lazy, fill=False)
    with ThreadPoolExecutor(1) as pool:
        blob = pool.submit(reader.read, 0, 0)
        assert asked.wait(60)
        reader.stop()
        with pytest.raises(HubError, match="not tried again"):
            blob.result(60)
    reader.close()


def test_a_reader_whose_filling_thread_fails_goes_on_without(
    filled: HubServer, expected: Callable[[int, int], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HubReader, "_fill", lambda self: 1 // 0)
    with HubReader(open_lazy()) as reader:
        assert torch.equal(reader.read(0, 0), expected(0, 0))


def test_layers_that_come_next_are_fetched_first(filled: HubServer, local: Path) -> None:
    with HubReader(open_lazy(), fill=False) as reader:
        assert inside(reader, "next")() == (0, 0)
        reader.read(0, 3)
        assert inside(reader, "next")() == (1, 0)
        last = len(Artifact.open(local).index.layers) - 1
        reader.read(last, 0)
        assert inside(reader, "next")() == (0, 0)


def test_a_partial_download_does_not_look_complete(filled: HubServer) -> None:
    lazy = open_lazy()
    with HubReader(lazy, fill=False) as reader:
        reader.read(0, 0)
    with pytest.raises(NotConvertedError, match="unfinished download"):
        Artifact.open(lazy.path)


def test_a_later_start_goes_on(
    filled: HubServer, local: Path, expected: Callable[[int, int], torch.Tensor]
) -> None:
    with HubReader(open_lazy(), fill=False) as reader:
        reader.read(0, 1), reader.read(1, 2)
    filled.requests.clear()
    with HubReader(open_lazy(), fill=False) as reader:
        assert torch.equal(reader.read(1, 2), expected(1, 2))
        assert reader.fetched_bytes == 0
        reader.read(0, 0)
    assert filled.served("trunk") == 0
    assert fetched(filled) == Artifact.open(local).entry(0, 0).length


def test_a_guess_that_was_given_up_goes_on_where_it_stopped(
    filled: HubServer, expected: Callable[[int, int], torch.Tensor]
) -> None:
    with HubReader(open_lazy(), fill=False) as reader:
        entry = reader.artifact.entry(0, 1)
        reader.load(0, 1, aligned_bytes(entry.length)).step(8192)
        assert reader.fetched_bytes == 8192
        assert torch.equal(reader.read(0, 1), expected(0, 1))
        assert reader.fetched_bytes == entry.length


def test_an_expert_is_recorded_after_its_bytes_are_durable(
    filled: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    lazy = open_lazy()
    states: list[bool] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (states.append(lazy.has(0, 1)), real(fd)))
    with HubReader(lazy, fill=False) as reader:
        reader.read(0, 1)
    # At the fsync of the layer's file, then at that of the record.
    assert states == [False, True]
    assert lazy.has(0, 1)


@pytest.mark.parametrize("fault", ["drop", "short", "ignore_range", "shift", "damage"])
def test_a_bad_line_gives_the_right_bytes(
    filled: HubServer, local: Path, fault: str, expected: Callable[[int, int], torch.Tensor]
) -> None:
    for name in filled.head(REPO).files:
        getattr(filled.faults, fault)(
            name, **({"at": 300} if fault == "damage" and "layer" not in name else {})
        )
    if fault == "damage":
        # A damaged index or header is refused. Only the trunk's and the experts' bytes have hashes.
        filled.faults.clear()
        filled.faults.damage("trunk", at=9000)
    lazy = open_lazy()
    with HubReader(lazy, fill=False) as reader:
        for n in range(len(lazy.artifact.index.layers)):
            arguments = (
                {"after": 5000} if fault == "drop" else {"at": 77} if fault == "damage" else {}
            )
            getattr(filled.faults, fault)(f"layer-{n:03d}", **arguments)
        for key in experts_of(local):
            assert torch.equal(reader.read(*key), expected(*key))
    assert verify_folder(lazy.path, read_data=True).problems == []


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_tried_again(
    filled: HubServer, status: int, expected: Callable[[int, int], torch.Tensor]
) -> None:
    for part in ("/api/models", "trunk", "layer-001"):
        filled.faults.status(status, part, Retry_After="1")
    with HubReader(open_lazy(), fill=False) as reader:
        filled.faults.status(status, "layer-001", Retry_After="1")
        assert torch.equal(reader.read(1, 0), expected(1, 0))


def test_a_changed_file_is_an_error_and_downloaded_files_stay(
    filled: HubServer, expected: Callable[[int, int], torch.Tensor]
) -> None:
    with HubReader(open_lazy(), fill=False) as reader:
        reader.read(0, 0)
        inside(inside(inside(reader, "folder").repo, "reader"), "locations").clear()
        filled.faults.change_etag("layer-001")
        with pytest.raises(HubError, match="ETag"):
            reader.read(1, 0)
        assert torch.equal(reader.read(0, 0), expected(0, 0))
        assert torch.equal(reader.read(1, 0), expected(1, 0))


def test_main_may_move_meanwhile(
    filled: HubServer,
    converted: Callable[[str], Path],
    expected: Callable[[int, int], torch.Tensor],
) -> None:
    with HubReader(open_lazy(), fill=False) as reader:
        other = converted("3bit")
        filled.commit(REPO, {str(p.relative_to(other)): p for p in other.rglob("*") if p.is_file()})
        assert torch.equal(reader.read(1, 1), expected(1, 1))
    assert open_lazy().path.name == filled.head(REPO).oid != reader.artifact.folder.name


def test_damage_in_the_repository_is_an_error_and_is_not_recorded(
    hub: HubServer, converted_copy: Path, expected: Callable[[int, int], torch.Tensor]
) -> None:
    entry = Artifact.open(converted_copy).entry(1, 2)
    with open(converted_copy / "experts/layer-001.safetensors", "r+b") as f:
        f.seek(entry.offset + 10)
        byte = f.read(1)
        f.seek(entry.offset + 10)
        f.write(bytes([byte[0] ^ 1]))
    hub.add(REPO, converted_copy)
    lazy = open_lazy()
    with HubReader(lazy, fill=False) as reader:
        for _ in range(2):
            with pytest.raises(
                DamageError, match=f"layer 1 expert 2 at offset {entry.offset}: the sha256"
            ):
                reader.read(1, 2)
        assert torch.equal(reader.read(1, 1), expected(1, 1))
    assert not lazy.has(1, 2)
    assert lazy.has(1, 1)


def test_a_trunk_of_another_hash_is_refused(filled: HubServer) -> None:
    filled.faults.damage("trunk", at=9000, times=-1)
    with pytest.raises(DamageError, match=r"trunk\.safetensors: its sha256"):
        open_lazy()


def test_a_broken_start_goes_on_with_the_trunk(filled: HubServer, local: Path) -> None:
    half = (local / "trunk.safetensors").stat().st_size // 2
    filled.faults.drop("trunk", after=half, times=1)
    filled.faults.status(503, "trunk.safetensors", times=-1)
    with pytest.raises(HubError):
        LazyFolder.open(REPO, retries=Retries(attempts=1))
    filled.faults.clear()
    filled.requests.clear()
    open_lazy()
    header_bytes = Artifact.open(local).trunk_header().data_offset
    assert filled.served("trunk") <= (local / "trunk.safetensors").stat().st_size + header_bytes


def test_a_closing_reader_does_not_wait_for_a_busy_hub(filled: HubServer) -> None:
    lazy = LazyFolder.open(REPO)
    filled.faults.status(429, "layer-", times=-1, Retry_After="250")
    reader = HubReader(lazy)
    reader.close()
    assert not inside(reader, "thread").is_alive()


def test_offline_downloaded_experts_can_be_used(
    filled: HubServer, monkeypatch: pytest.MonkeyPatch, expected: Callable[[int, int], torch.Tensor]
) -> None:
    with HubReader(open_lazy(), fill=False) as reader:
        reader.read(0, 0)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with HubReader(open_lazy(), fill=False) as reader:
        assert torch.equal(reader.read(0, 0), expected(0, 0))
        with pytest.raises(HubError, match="offline"):
            reader.read(0, 1)
    with pytest.raises(HubError, match="offline"):
        LazyFolder.open("me/never-seen")


def test_no_room_for_the_model_is_said_before_it_is_fetched(
    filled: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        lazy_folder.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1)
    )
    with pytest.raises(DoesNotFitError, match="free are 1"):
        open_lazy()


def test_experts_in_the_users_cache_are_not_fetched(
    filled: HubServer, expected: Callable[..., torch.Tensor]
) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download(REPO, "experts/layer-001.safetensors")
    filled.requests.clear()
    with HubReader(open_lazy(), fill=False) as reader:
        assert torch.equal(reader.read(1, 1), expected(1, 1))
        assert reader.fetched_bytes == 0


def test_a_whole_repository_is_used_in_the_cache_and_never_written_to(
    filled: HubServer, local: Path
) -> None:
    assert generate(REPO) == generate(local)
    blobs = [
        p
        for p in (Path(os.environ["HF_HOME"]) / "hub").rglob("*")
        if p.is_file() and not p.is_symlink()
    ]
    names = {hashlib.sha256(p.read_bytes()).hexdigest() for p in blobs}
    assert {b.sha256 for name, b in filled.head(REPO).files.items() if b.lfs} <= names
    filled.requests.clear()
    generate(REPO)
    assert filled.served() == 0


def test_a_revision_is_loaded(filled: HubServer, local: Path) -> None:
    old = filled.head(REPO).oid
    filled.commit(REPO, {"moe_index.json": b"{}"})
    with pytest.raises(FormatError):
        loader.from_pretrained(REPO)
    assert generate(REPO, revision=old, lazy=True) == generate(local)


def test_a_tokenizer_comes_without_weights(filled: HubServer, local: Path) -> None:
    tokenizer = loader.load_tokenizer(REPO)
    assert tokenizer(PROMPT).input_ids == loader.load_tokenizer(local)(PROMPT).input_ids
    assert filled.served("safetensors") == 0


def test_an_ordinary_checkpoint_is_refused_before_it_is_fetched(
    hub: HubServer, example_folder: Path
) -> None:
    hub.add("me/tiny", example_folder)
    with pytest.raises(NotConvertedError, match="is not converted"):
        loader.from_pretrained("me/tiny")
    with pytest.raises(NotConvertedError, match="is not converted"):
        loader.from_pretrained("me/tiny", lazy=True)
    assert hub.served() == 0


def test_options_that_cannot_be_are_refused(filled: HubServer, local: Path) -> None:
    with pytest.raises(RecipeError, match="mmap"):
        loader.from_pretrained(REPO, lazy=True, io="mmap")
    with pytest.raises(RecipeError, match="only for a repository"):
        loader.from_pretrained(local, lazy=True)


def test_generate_says_what_is_there(
    filled: HubServer, local: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*args: object) -> dict[str, object]:
        with pytest.raises(SystemExit) as exit_:
            main(
                [
                    "generate",
                    *map(str, args),
                    "--kernels",
                    "torch",
                    "--max-new-tokens",
                    "6",
                    "--prompt",
                    PROMPT,
                ]
            )
        assert exit_.value.code == 0
        value: dict[str, object] = json.loads(capsys.readouterr().out)
        return value

    lazy = run(REPO, "--lazy", "--json")
    assert lazy["text"] == run(local, "--json")["text"]
    assert 0 < lazy["experts_there_bytes"] <= lazy["experts_bytes"] == expert_bytes(local)
