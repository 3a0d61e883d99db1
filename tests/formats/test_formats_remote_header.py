import json
import struct

import pytest
from hub_server import HubServer

from formats.errors import DamageError, FormatError
from formats.hub.ranges import Retries
from formats.hub.remote_header import fetch_header
from formats.hub.repo import HubRepo

NAME = "model.safetensors"


def file_with_header(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


def header_text(padding: int = 0) -> bytes:
    entry = {"dtype": "U8", "shape": [100], "data_offsets": [0, 100]}
    return json.dumps({"a": entry}).encode() + b" " * padding


def opened(hub: HubServer, content: bytes) -> HubRepo:
    hub.add("me/model", {NAME: content})
    return HubRepo.open("me/model", retries=Retries(attempts=1, wait=lambda s: None))


@pytest.mark.parametrize(("padding", "requests"), [(0, 1), (1000, 2)])
def test_header_longer_than_the_first_range_takes_a_second_one(
    hub: HubServer, padding: int, requests: int
) -> None:
    content = file_with_header(header_text(padding), bytes(100))
    repo = opened(hub, content)
    hub.requests.clear()
    header, start = fetch_header(repo, NAME, 10_000, first_bytes=200)
    assert start == content[:-100]
    assert header.entries["a"].end == 100
    assert len([r for r in hub.requests if r.end > r.begin]) == requests


def test_nothing_more_is_read_of_a_header_over_the_limit(hub: HubServer) -> None:
    repo = opened(hub, file_with_header(header_text(5000), bytes(100)))
    hub.requests.clear()
    with pytest.raises(FormatError, match=r"me/model@.*: model.safetensors: header of .* bytes"):
        fetch_header(repo, NAME, 1000, first_bytes=200)
    assert sum(r.end - r.begin for r in hub.requests) == 200


@pytest.mark.parametrize("content", [b"short", file_with_header(header_text())[:60]])
def test_file_that_ends_before_its_header_is_damage(hub: HubServer, content: bytes) -> None:
    with pytest.raises(DamageError):
        fetch_header(opened(hub, content), NAME, 10_000, first_bytes=4096)
