"""A converted model in a repository of the fake Hub, for tests of lazy downloads."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hub_server import HubServer

import loader
from formats.artifact import Artifact
from formats.hub.lazy_folder import LazyFolder
from formats.hub.ranges import Retries
from formats.reading.mmap_reader import MmapReader

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
