"""Lazy downloads: each expert comes once, verified, and is kept for later starts."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from forked import in_child, needs_fork
from hub_server import HubServer
from inside import inside
from lazy_repository import (
    REPO,
    expected,
    expert_bytes,
    experts_of,
    fetched,
    filled,
    generate,
    local,
    open_lazy,
)

from formats.artifact import Artifact
from formats.errors import (
    NotConvertedError,
)
from formats.hub import lazy_folder
from formats.hub.lazy_reader import HubReader
from formats.reading.reader import aligned_bytes
from formats.reading.verify import verify_folder

__all__ = ["expected", "filled", "local"]


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
            lambda: len(inside(reader, "checked")) == len(inside(reader, "entries")), timeout=120
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


def test_experts_in_the_users_cache_are_not_fetched(
    filled: HubServer, expected: Callable[..., torch.Tensor]
) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download(REPO, "experts/layer-001.safetensors")
    filled.requests.clear()
    with HubReader(open_lazy(), fill=False) as reader:
        assert torch.equal(reader.read(1, 1), expected(1, 1))
        assert reader.fetched_bytes == 0
