"""The loopback Hub against huggingface_hub: the behaviour that other tests rely on."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
    snapshot_download,
    whoami,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

WEIGHTS = bytes(range(256)) * 100
FILES = {
    "config.json": b"{}",
    "model.safetensors": WEIGHTS,
    "experts/layer-000.safetensors": WEIGHTS[::-1],
}


@pytest.fixture
def filled(hub: HubServer) -> HubServer:
    hub.add("me/model", FILES)
    return hub


def get(url: str, **headers: str) -> tuple[int, bytes]:
    answer = get_session().get(url, headers=headers)
    return answer.status_code, answer.content


def test_a_snapshot_is_what_was_added(filled: HubServer) -> None:
    folder = Path(snapshot_download("me/model"))
    assert folder.name == filled.head("me/model").oid
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert (folder / "model.safetensors").resolve().name == hashlib.sha256(WEIGHTS).hexdigest()


def test_a_process_with_its_environment_uses_it(filled: HubServer, tmp_path: Path) -> None:
    code = "import huggingface_hub as h; print(h.hf_hub_download('me/model', 'config.json'))"
    environ = os.environ | filled.environ(tmp_path / "other")
    found = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    assert Path(found.stdout.strip()).is_relative_to(tmp_path / "other")


def test_an_upload_is_one_commit_and_checked_by_its_hashes(hub: HubServer, tmp_path: Path) -> None:
    for name, content in FILES.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(content)
    api = HfApi()
    api.create_repo("me/new", private=True)
    before = len(hub.repos["me/new"].commits)
    api.upload_folder(repo_id="me/new", folder_path=tmp_path / "out")
    assert hub.files("me/new").items() >= FILES.items()
    assert len(hub.repos["me/new"].commits) == before + 1
    assert api.verify_repo_checksums("me/new", local_dir=tmp_path / "out").mismatches == []


def test_unchanged_files_are_not_sent_again(filled: HubServer, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    add = CommitOperationAdd("model.safetensors", str(tmp_path / "model.safetensors"))
    commit = HfApi().create_commit("me/model", [add], commit_message="again")
    assert commit.oid == filled.head("me/model").oid
    assert not filled.objects


def test_a_commit_on_another_parent_is_refused(filled: HubServer) -> None:
    parent = filled.head("me/model").oid
    filled.commit("me/model", {"x.txt": b"first"})
    add = CommitOperationAdd("x.txt", b"second")
    with pytest.raises(HfHubHTTPError, match="412"):
        HfApi().create_commit("me/model", [add], commit_message="late", parent_commit=parent)
    assert filled.files("me/model")["x.txt"] == b"first"


def test_a_pull_request_leaves_main_alone(filled: HubServer) -> None:
    operations = [CommitOperationAdd("x.txt", b"x"), CommitOperationDelete("config.json")]
    commit = HfApi().create_commit("me/model", operations, commit_message="change", create_pr=True)
    assert "config.json" in filled.files("me/model")
    assert "config.json" not in filled.files("me/model", commit.pr_revision or "")


def test_a_bad_card_is_refused(filled: HubServer) -> None:
    card = b"---\nbase_model_relation: quantised\n---\n"
    with pytest.raises(ValueError, match="base_model_relation"):
        HfApi().create_commit(
            "me/model", [CommitOperationAdd("README.md", card)], commit_message="card"
        )


def test_files_are_listed_with_hashes_and_sizes(filled: HubServer) -> None:
    found = {f.path: f for f in HfApi().list_repo_tree("me/model", recursive=True)}
    assert found["model.safetensors"].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert found["experts/layer-000.safetensors"].size == len(WEIGHTS)
    assert [f.path for f in HfApi().get_paths_info("me/model", ["config.json"])] == ["config.json"]
    info = HfApi().model_info("me/model", files_metadata=True)
    assert {s.rfilename for s in info.siblings or []} >= set(FILES)


def test_branches_are_made_and_named(filled: HubServer) -> None:
    HfApi().create_branch("me/model", branch="v2")
    assert {b.name for b in HfApi().list_repo_refs("me/model").branches} == {"main", "v2"}


def test_the_user_is_known_by_the_token(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert whoami()["name"] == "me"
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        whoami()


def test_what_is_not_there_has_the_errors_of_the_client(
    filled: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download("me/model", "nothing")
    with pytest.raises(RevisionNotFoundError):
        HfApi().model_info("me/model", revision="nothing")
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info("me/nothing")
    filled.add("me/gated", FILES, gated=True)
    filled.add("me/private", FILES, private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(GatedRepoError):
        hf_hub_download("me/gated", "config.json")
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi().model_info("me/private")


def test_ranges_are_counted_and_the_token_stays_at_the_first_host(filled: HubServer) -> None:
    url = f"{filled.url}/me/model/resolve/main/model.safetensors"
    assert get(url, Range="bytes=10-19", Authorization="Bearer hf_me") == (206, WEIGHTS[10:20])
    assert get(url, Range=f"bytes={len(WEIGHTS)}-")[0] == 416
    assert filled.ranges("model.safetensors") == [(10, 20)]
    assert [(r.host, r.token) for r in filled.requests][:2] == [("hub", True), ("cdn", False)]


def test_faults_happen_as_often_as_asked(filled: HubServer) -> None:
    url = f"{filled.url}/me/model/resolve/main/model.safetensors"
    filled.faults.ignore_range("model.safetensors")
    filled.faults.status(503, "model.safetensors", Retry_After="3")
    assert get(url, Range="bytes=10-19")[0] == 503
    assert get(url, Range="bytes=10-19") == (200, WEIGHTS)
    filled.faults.short("model.safetensors")
    assert get(url, Range="bytes=10-19") == (206, WEIGHTS[10:19])
    filled.faults.damage("model.safetensors", at=2)
    assert get(url, Range="bytes=0-3") == (206, bytes([0, 1, 3, 3]))
    filled.faults.shift("model.safetensors", by=3)
    assert get(url, Range="bytes=0-3") == (206, WEIGHTS[3:7])
    filled.faults.drop("model.safetensors", after=100)
    with pytest.raises(Exception, match="peer closed connection"):
        get(url)
    assert get(url) == (200, WEIGHTS)


def test_main_can_move_during_a_download(filled: HubServer) -> None:
    pinned = filled.head("me/model").oid
    filled.faults.before(
        "/resolve/", lambda: filled.commit("me/model", {"model.safetensors": b"new"})
    )
    folder = Path(snapshot_download("me/model"))
    assert folder.name == pinned
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert filled.files("me/model")["model.safetensors"] == b"new"
