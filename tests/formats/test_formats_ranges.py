"""Byte ranges over a bad line give the right bytes or a typed error; the token goes to no other
host.
"""

import dataclasses
import logging
import pickle
import threading
import traceback

import pytest
from hub_server import TOKEN, HubServer
from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils import get_session

from formats.errors import HubError
from formats.hub.hub_errors import hub_call
from formats.hub.ranges import RemoteFile, Retries
from formats.hub.repo import HubRepo
from formats.repo_names import is_repo_name

WEIGHTS = bytes(i * i % 251 for i in range(5 << 19))
FILES = {"config.json": b'{"a": 1}', "model.safetensors": WEIGHTS}
NAME = "model.safetensors"


class Pauses(list[float]):
    """Records the waits instead of waiting."""

    def retries(self, attempts: int = 4) -> Retries:
        return Retries(attempts=attempts, wait=self.append)


@pytest.fixture
def pauses() -> Pauses:
    return Pauses()


@pytest.fixture
def repo(hub: HubServer, pauses: Pauses) -> HubRepo:
    hub.add("me/model", FILES)
    return HubRepo.open("me/model", retries=pauses.retries())


def test_a_range_is_the_bytes_that_were_asked_for(repo: HubRepo, hub: HubServer) -> None:
    assert repo.read(NAME, 1000, 3000) == WEIGHTS[1000:3000]
    assert repo.read("config.json", 1, 4) == FILES["config.json"][1:4]
    assert repo.read(NAME, 5, 5) == b""
    assert hub.served(NAME) == 2000


def test_a_whole_file_is_asked_for_without_a_range(repo: HubRepo, hub: HubServer) -> None:
    hub.faults.ignore_range(times=-1)
    for name, content in FILES.items():
        assert repo.read(name, 0, len(content)) == content


def test_a_buffer_is_filled(repo: HubRepo) -> None:
    buffer = bytearray(2 << 20)
    repo.read_into(NAME, 77, memoryview(buffer))
    assert buffer == WEIGHTS[77 : 77 + len(buffer)]


def test_the_signed_address_is_asked_for_once(repo: HubRepo, hub: HubServer) -> None:
    hub.requests.clear()
    for begin in range(0, 400, 100):
        repo.read(NAME, begin, begin + 100)
    assert [r.host for r in hub.requests] == ["hub", "cdn", "cdn", "cdn", "cdn"]


def test_an_address_that_expired_is_asked_for_again(repo: HubRepo, hub: HubServer) -> None:
    repo.read(NAME, 0, 10)
    hub.requests.clear()
    hub.faults.status(403, NAME)
    assert repo.read(NAME, 0, 10) == WEIGHTS[:10]
    assert [r.host for r in hub.requests] == ["cdn", "hub", "cdn"]


def test_a_broken_line_goes_on_where_it_broke(
    repo: HubRepo, hub: HubServer, pauses: Pauses
) -> None:
    hub.faults.drop(NAME, after=1000)
    assert repo.read(NAME, 0, 5000) == WEIGHTS[:5000]
    assert hub.ranges(NAME) == [(0, 1000), (1000, 5000)]
    assert pauses == [1.0]


@pytest.mark.parametrize("fault", ["ignore_range", "short", "shift"])
def test_a_wrong_answer_is_asked_for_again(repo: HubRepo, hub: HubServer, fault: str) -> None:
    getattr(hub.faults, fault)(NAME)
    assert repo.read(NAME, 100, 400) == WEIGHTS[100:400]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("ignore_range", "the range was ignored"),
        ("short", "Content-Length"),
        ("shift", "Content-Range"),
    ],
)
def test_a_server_that_stays_wrong_is_given_up(
    repo: HubRepo, hub: HubServer, pauses: Pauses, fault: str, words: str
) -> None:
    getattr(hub.faults, fault)(NAME, times=-1)
    with pytest.raises(HubError, match=words):
        repo.read(NAME, 100, 400)
    assert pauses == [1.0, 2.0, 4.0]


def test_a_line_that_gives_a_mebibyte_a_time_is_not_given_up(repo: HubRepo, hub: HubServer) -> None:
    hub.faults.drop(NAME, after=1 << 20, times=-1)
    repo = HubRepo.open("me/model", retries=Retries(attempts=2, wait=lambda s: None))
    assert repo.read(NAME, 0, len(WEIGHTS)) == WEIGHTS


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again_when_it_says(
    repo: HubRepo, hub: HubServer, pauses: Pauses, status: int
) -> None:
    hub.faults.status(status, NAME, Retry_After="7")
    assert repo.read(NAME, 0, 100) == WEIGHTS[:100]
    assert pauses == [7.0]


def test_a_server_that_stalls_is_asked_again(
    hub: HubServer, pauses: Pauses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.add("me/model", FILES)
    again = threading.Event()
    hub.faults.before(NAME, lambda: again.wait(60))
    hub.faults.before(NAME, again.set)
    assert HubRepo.open("me/model", retries=pauses.retries()).read(NAME, 0, 100) == WEIGHTS[:100]
    assert pauses == [1.0]


def test_the_rate_limit_header_is_kept_to(repo: HubRepo, hub: HubServer, pauses: Pauses) -> None:
    hub.faults.status(429, NAME, RateLimit='"resolvers";r=0;t=55')
    repo.read(NAME, 0, 100)
    assert pauses == [55.0]


def test_a_pause_of_hours_is_an_error(repo: HubRepo, hub: HubServer, pauses: Pauses) -> None:
    hub.faults.status(429, NAME, Retry_After="86400")
    with pytest.raises(HubError, match="86400 s"):
        repo.read(NAME, 0, 100)
    assert pauses == []


def test_a_busy_api_is_asked_again(hub: HubServer, pauses: Pauses) -> None:
    hub.add("me/model", FILES)
    hub.faults.status(503, "/api/models")
    hub.faults.status(429, "/api/models", Retry_After="9")
    assert HubRepo.open("me/model", retries=pauses.retries()).files[NAME].size == len(WEIGHTS)
    assert pauses == [1.0, 9.0]


def test_another_etag_is_refused(repo: HubRepo, hub: HubServer) -> None:
    hub.faults.change_etag(NAME)
    with pytest.raises(HubError, match="ETag 0000"):
        repo.read(NAME, 0, 100)


def test_main_may_move_under_a_pinned_commit(repo: HubRepo, hub: HubServer) -> None:
    hub.commit("me/model", {NAME: b"new"})
    assert repo.read(NAME, 0, 100) == WEIGHTS[:100]
    assert HubRepo.open("me/model").files[NAME].size == 3


def test_the_token_goes_to_no_other_host(repo: HubRepo, hub: HubServer) -> None:
    hub.requests.clear()
    repo.read(NAME, 0, 100)
    assert [(r.host, r.token) for r in hub.requests] == [("hub", True), ("cdn", False)]


def test_a_redirect_within_the_host_keeps_the_token(repo: HubRepo, hub: HubServer) -> None:
    hub.add("me/renamed", FILES, private=True)
    hub.faults.redirect(f"/me/renamed/resolve/main/{NAME}", "me/model/resolve")
    with pytest.raises(HubError, match="commit"):
        repo.read(NAME, 0, 100)
    assert [r.token for r in hub.requests if "renamed" in r.path] == [True]


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://x/y", "javascript:1"])
def test_a_redirect_out_of_http_is_refused(repo: HubRepo, hub: HubServer, location: str) -> None:
    hub.faults.redirect(location, NAME)
    # Some releases of httpx parse the address before our check, and report it as invalid.
    refused = "not followed|invalid address" if location == "javascript:1" else "not followed"
    with pytest.raises(HubError, match=refused):
        repo.read(NAME, 0, 100)


@pytest.mark.parametrize("address", ["http://me.example:x", "me.example"])
def test_an_endpoint_that_is_no_address_is_not_tried_again(
    hub: HubServer, pauses: Pauses, address: str
) -> None:
    with pytest.raises(HubError, match="address") as caught:
        hub_call(lambda: get_session().get(address), "me/model", pauses.retries())
    assert caught.value.hint == "check HF_ENDPOINT"
    assert pauses == []


def test_redirects_in_a_circle_end(repo: HubRepo, hub: HubServer) -> None:
    hub.faults.redirect(f"{hub.url}/me/model/resolve/main/{NAME}", NAME, times=-1)
    with pytest.raises(HubError, match="redirects"):
        repo.read(NAME, 0, 100)


def test_the_token_and_the_signature_are_in_no_error_and_no_log(
    repo: HubRepo, hub: HubServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "formats")
    hub.faults.drop(NAME, times=2)
    hub.faults.status(503, NAME, times=-1)
    with pytest.raises(HubError) as caught:
        repo.read(NAME, 0, 100)
    hub.repos["me/model"].gated = True
    hub.faults.clear()
    hub.faults.status(401, "/api/models")
    with pytest.raises(HubError) as other:
        HubRepo.open("me/model")
    said = "".join(traceback.format_exception(caught.value)) + "".join(
        traceback.format_exception(other.value)
    )
    for text in (said, caplog.text, repr(repo), str(vars(caught.value))):
        assert TOKEN not in text
        assert "secret" not in text
    # Nothing hangs on to the request either.
    assert caught.value.__context__ is None
    assert other.value.__context__ is None
    pickle.dumps(caught.value)


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_gated_and_private_repositories_say_what_to_do(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    hub.add("me/gated", FILES, gated=True)
    hub.add("me/private", FILES, private=True)
    monkeypatch.delenv("HF_TOKEN")
    if token is None:
        with pytest.raises(HubError, match="hf auth login"):
            HubRepo.open("me/gated").read(NAME, 0, 10)
    with pytest.raises(HubError, match="hf auth login"):
        HubRepo.open("me/private", token=token)
    assert HubRepo.open("me/private", token=TOKEN).read(NAME, 0, 10) == WEIGHTS[:10]


def test_what_is_not_there_is_named(repo: HubRepo) -> None:
    with pytest.raises(HubError, match="me/nothing"):
        HubRepo.open("me/nothing")
    with pytest.raises(HubError, match="no such revision"):
        HubRepo.open("me/model", revision="v9")
    with pytest.raises(HubError, match="no file nothing"):
        repo.read("nothing", 0, 1)
    with pytest.raises(HubError, match="asked for, it has"):
        repo.read(NAME, 0, len(WEIGHTS) + 1)


def test_a_name_that_is_no_repository_is_refused() -> None:
    assert is_repo_name("mistralai/Mixtral-8x7B-v0.1")
    for name in (
        "model",
        "./model",
        "../model",
        "a/b/c",
        "/a/b",
        "a/",
        "a/..",
        "-a/b",
        "a b/c",
        "a/b--c",
    ):
        assert not is_repo_name(name), name


def test_offline_only_the_cache_is_used(
    repo: HubRepo, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot_download("me/model", allow_patterns="*.json")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    offline = HubRepo.open("me/model")
    assert offline.commit == repo.commit
    assert offline.files.keys() == {"config.json"}
    with pytest.raises(HubError, match="offline"):
        offline.read(NAME, 0, 1)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("field", "value"), [("oid", "../../etc"), ("git_oid", "x"), ("sha256", "../" * 22)]
)
def test_hashes_from_the_hub_that_are_none_are_refused(
    hub: HubServer, field: str, value: str
) -> None:
    hub.add("me/model", FILES)
    repo = hub.repos["me/model"]
    head = repo.commits[repo.refs["main"]]
    if field == "oid":
        repo.commits[repo.refs["main"]] = dataclasses.replace(head, oid=value)
    else:
        name = NAME if field == "sha256" else "config.json"
        head.files[name] = dataclasses.replace(head.files[name], **{field: value})
    with pytest.raises(HubError, match="is not a hash"):
        HubRepo.open("me/model")


def test_a_file_of_another_commit_in_the_cache_is_found(repo: HubRepo, hub: HubServer) -> None:
    repo.snapshot([NAME])
    hub.commit("me/model", {"README.md": b"new"})
    later = HubRepo.open("me/model")
    assert later.commit != repo.commit
    found = later.cached(NAME)
    assert found
    assert found.read_bytes() == WEIGHTS


def test_a_file_in_the_cache_is_found_with_its_size(repo: HubRepo) -> None:
    assert repo.cached(NAME) is None
    folder = repo.snapshot([NAME])
    assert repo.cached(NAME) == folder / NAME
    assert isinstance(repo.files[NAME], RemoteFile)
    assert repo.files[NAME].sha256 == (folder / NAME).resolve().name
