"""The HTTP client of byte ranges beside huggingface_hub's shared client."""

import importlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from forked import in_child, needs_fork
from hub_server import HubServer
from huggingface_hub import set_client_factory
from huggingface_hub.utils import get_session

from formats.hub.http_client import client_factory, range_client
from formats.hub.repo import HubRepo

DATA = bytes(range(256)) * 4


@pytest.fixture
def factory() -> Iterator[Callable[[], Any]]:
    """huggingface_hub's present factory, set again after the test."""
    present = client_factory()
    yield present
    set_client_factory(present)


@needs_fork
def test_a_forked_child_does_not_wait_for_a_thread_that_reads_ranges(
    hub: HubServer, factory: Callable[[], Any]
) -> None:
    parent = os.getpid()
    http = importlib.import_module(type(get_session()).__module__.partition(".")[0])

    class Transport(http.HTTPTransport):  # type: ignore[name-defined, misc]
        """A transport whose lock a reading thread holds at the fork."""

        has_ranges = False

        def handle_request(self, request: Any) -> Any:
            self.has_ranges |= "range" in request.headers
            return super().handle_request(request)

        def close(self) -> None:
            if self.has_ranges and os.getpid() != parent:
                threading.Event().wait()
            super().close()

    set_client_factory(lambda: http.Client(transport=Transport()))
    hub.add("me/model", {"model.safetensors": DATA})
    repo = HubRepo.open("me/model")
    assert repo.read("model.safetensors", 3, 900) == DATA[3:900]
    assert in_child(lambda: repo.read("model.safetensors", 5, 800), timeout_s=20) == DATA[5:800]


def test_ranges_are_read_by_a_client_of_the_programs_factory(
    factory: Callable[[], Any],
) -> None:
    made = []
    set_client_factory(lambda: made.append(factory()) or made[-1])
    assert range_client() is range_client() is made[0]
    assert get_session() is not range_client()


def test_threads_share_one_client(factory: Callable[[], Any]) -> None:
    set_client_factory(lambda: factory())
    clients = []
    threads = [threading.Thread(target=lambda: clients.append(range_client())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(client) for client in clients}) == 1
