"""upload as a user calls it: one commit, no file twice, no damaged file, a valid model card."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from damaged_files import flip
from hub_server import TOKEN, HubServer
from huggingface_hub import HfApi, snapshot_download
from safetensors import safe_open

from formats.artifact import Artifact

REPO = "me/tiny-2bit"
Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def run(run_command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr("time.sleep", lambda s: None)

    def call(command: str, *args: object) -> tuple[int, dict[str, Any]]:
        code, out, _ = run_command(command, *args, "--json", "-q")
        return code, json.loads(out) if out else {}

    return call


@pytest.fixture
def upload(run: Run, converted_copy: Path) -> Run:
    return lambda *args: run("upload", converted_copy, REPO, "--license", "apache-2.0", *args)


def metadata(card: bytes) -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load(card.decode().split("---\n")[1])
    return value


def test_one_commit_makes_the_whole_model_visible(
    hub: HubServer, upload: Run, converted_copy: Path
) -> None:
    code, facts = upload()
    assert code == 0
    head = hub.head(REPO)
    assert facts["commit"] == head.oid
    assert head.parent is not None
    assert hub.repos[REPO].commits[head.parent].parent is None
    files = hub.files(REPO)
    local = {
        str(p.relative_to(converted_copy)): p.read_bytes()
        for p in converted_copy.rglob("*")
        if p.is_file()
    }
    assert {n: files[n] for n in local if n != "README.md"} == {
        n: c for n, c in local.items() if n != "README.md"
    }


def test_unchanged_files_are_not_sent_again(
    hub: HubServer, upload: Run, converted_copy: Path
) -> None:
    first = upload()[1]["commit"]
    hub.requests.clear()
    code, facts = upload()
    assert (code, facts["sent_files"], facts["commit"]) == (0, {}, None)
    assert hub.head(REPO).oid == first
    (converted_copy / "quality.json").write_bytes(
        (converted_copy / "quality.json").read_bytes() + b"\n"
    )
    assert set(upload()[1]["sent_files"]) == {"quality.json"}
    assert not any(r.method == "PUT" for r in hub.requests)


def test_a_damaged_folder_is_refused(hub: HubServer, upload: Run, converted_copy: Path) -> None:
    flip(converted_copy / "experts/layer-001.safetensors", 50_000)
    code, facts = upload()
    assert code == 3
    assert "layer 1 expert" in facts["problems"][0]
    assert REPO not in hub.repos


def test_an_unfinished_folder_is_refused(hub: HubServer, upload: Run, converted_copy: Path) -> None:
    (converted_copy / "moe_index.json").unlink()
    assert upload()[0] == 3
    assert REPO not in hub.repos


def test_without_a_licence_nothing_is_sent(hub: HubServer, run: Run, converted_copy: Path) -> None:
    assert run("upload", converted_copy, REPO)[0] == 1
    assert REPO not in hub.repos


def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(
    hub: HubServer, upload: Run, converted_copy: Path
) -> None:
    code, facts = upload("--dry-run")
    assert code == 0
    assert REPO not in hub.repos
    assert (
        facts["sent_files"]["moe_index.json"] == (converted_copy / "moe_index.json").stat().st_size
    )
    upload()
    assert upload("--dry-run")[1]["sent_files"] == {}


def test_a_private_repository_is_made(hub: HubServer, upload: Run) -> None:
    assert upload("--private")[0] == 0
    assert hub.repos[REPO].private


def test_a_pull_request_leaves_the_branch_alone(
    hub: HubServer, upload: Run, converted_copy: Path
) -> None:
    upload()
    main_ = hub.head(REPO).oid
    (converted_copy / "quality.json").write_bytes(
        (converted_copy / "quality.json").read_bytes() + b"\n"
    )
    code, facts = upload("--create-pr")
    assert code == 0
    assert "discussions/1" in facts["url"]
    assert hub.head(REPO).oid == main_
    assert hub.head(REPO, "refs/pr/1").oid == facts["commit"]


def test_a_branch_is_made(hub: HubServer, upload: Run) -> None:
    assert upload("--revision", "two")[0] == 0
    assert "moe_index.json" in hub.files(REPO, "two")
    assert "moe_index.json" not in hub.files(REPO)


def test_a_commit_of_somebody_else_in_between_is_an_error_and_both_stay_whole(
    hub: HubServer, upload: Run
) -> None:
    hub.add(REPO, {"notes.md": b"mine"})
    hub.faults.before("/preupload/", lambda: hub.commit(REPO, {"notes.md": b"newer"}))
    assert upload()[0] == 1
    assert hub.files(REPO)["notes.md"] == b"newer"
    assert "moe_index.json" not in hub.files(REPO)
    assert upload()[0] == 0


@pytest.mark.parametrize("path", ["/preupload/", "/commit/", ".git/info/lfs", "validate-yaml"])
def test_a_busy_hub_is_tried_again(hub: HubServer, upload: Run, path: str) -> None:
    hub.faults.status(503, path)
    hub.faults.status(429, path, Retry_After="1")
    assert upload()[0] == 0
    assert "moe_index.json" in hub.files(REPO)


def test_experts_of_an_earlier_model_go(hub: HubServer, upload: Run) -> None:
    hub.add(REPO, {"experts/layer-077.safetensors": b"old", "notes.md": b"mine"})
    assert upload()[1]["deleted_files"] == ["experts/layer-077.safetensors"]
    assert "experts/layer-077.safetensors" not in hub.files(REPO)
    assert hub.files(REPO)["notes.md"] == b"mine"


def test_a_repository_that_transformers_would_load_is_refused(hub: HubServer, upload: Run) -> None:
    hub.add(REPO, {"model.safetensors": b"other weights"})
    assert upload()[0] == 1
    assert "moe_index.json" not in hub.files(REPO)


def test_the_card_has_what_the_hub_reads(hub: HubServer, upload: Run) -> None:
    upload("--base-model", "me/tiny")
    card = hub.files(REPO)["README.md"]
    found = metadata(card)
    assert found["base_model"] == "me/tiny"
    assert (found["base_model_relation"], found["library_name"]) == ("quantized", "moe-convert")
    assert (found["license"], found["pipeline_tag"]) == ("apache-2.0", "text-generation")
    assert f'loader.from_pretrained("{REPO}")' in card.decode()


def test_a_card_that_the_hub_refuses_is_not_sent(
    hub: HubServer, upload: Run, converted_copy: Path
) -> None:
    (converted_copy / "README.md").write_text("---\ntags: none\n---\nmine")
    assert upload()[0] == 1
    assert REPO not in hub.repos


def test_a_card_that_somebody_wrote_is_kept(
    hub: HubServer, upload: Run, converted_copy: Path
) -> None:
    (converted_copy / "README.md").write_text("---\nlicense: mit\n---\nmine")
    upload()
    assert hub.files(REPO)["README.md"] == b"---\nlicense: mit\n---\nmine"


@pytest.mark.parametrize("name", ["README.md", "quality.json"])
def test_a_link_out_of_the_folder_is_not_published(
    hub: HubServer, upload: Run, converted_copy: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "id_ed25519").write_text("a private key")
    (converted_copy / name).unlink()
    (converted_copy / name).symlink_to(tmp_path / "id_ed25519")
    assert upload()[0] == 1
    assert REPO not in hub.repos


def test_a_pipe_in_the_place_of_the_card_is_refused(
    hub: HubServer, upload: Run, converted_copy: Path
) -> None:
    (converted_copy / "README.md").unlink()
    os.mkfifo(converted_copy / "README.md")
    assert upload()[0] == 1
    assert REPO not in hub.repos


def test_a_card_that_is_no_text_is_refused(
    hub: HubServer, upload: Run, converted_copy: Path
) -> None:
    (converted_copy / "README.md").write_bytes(b"\xff\xfe")
    assert upload()[0] == 1
    assert REPO not in hub.repos


def test_a_licence_file_needs_no_option(
    hub: HubServer, run: Run, example_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(example_folder, tmp_path / "source"))
    (source / "LICENSE").write_text("Apache License\n  Version 2.0, January 2004")
    code, facts = run(
        "convert", source, "-o", tmp_path / "out", "--solver", "hqq", "--upload-repo", REPO
    )
    assert code == 0
    assert facts["upload"]["commit"] == hub.head(REPO).oid
    assert metadata(hub.files(REPO)["README.md"])["license"] == "apache-2.0"


def test_convert_refuses_a_missing_licence_before_it_begins(
    hub: HubServer, run: Run, example_folder: Path, tmp_path: Path
) -> None:
    assert run("convert", example_folder, "-o", tmp_path / "out", "--upload-repo", REPO)[0] == 1
    assert not (tmp_path / "out").exists()


def test_what_was_published_is_what_others_get(hub: HubServer, upload: Run) -> None:
    upload()
    folder = Path(snapshot_download(REPO))
    assert not HfApi().verify_repo_checksums(REPO, token=TOKEN).mismatches
    with safe_open(folder / "experts/layer-000.safetensors", "pt") as file:
        assert file.get_slice("model.layers.0.mlp.experts.0.down").get_shape()
    assert Artifact.open(folder).index.layers
