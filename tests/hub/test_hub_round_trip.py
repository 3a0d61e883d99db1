"""A round trip: checkpoint on the Hub, conversion, upload, tokens from the published model."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from project_paths import ROOT
from safetensors import safe_open

import loader
from converter.cli.main import main
from formats.artifact import Artifact
from formats.hub.lazy_folder import LazyFolder
from formats.hub.lazy_reader import HubReader
from formats.hub.ranges import Retries
from formats.reading.verify import verify_folder

SOURCE, REPO = "me/tiny", "me/tiny-2bit"
PROMPT = "So Jonah arose, and went to Nineveh, according to"

LAZY_PROCESS = f"""
from formats.hub.lazy_reader import HubReader
from formats.hub.lazy_folder import LazyFolder
folder = LazyFolder.open("{REPO}")
record = folder.record
def say(experts):
    record(experts)
    print(flush=True)
folder.record = say
reader = HubReader(folder, fill=False)
for layer in range(len(reader.artifact.index.layers)):
    for expert in range(8):
        reader.read(layer, expert)
"""
"""Says a line whenever experts were recorded, which a thread does behind the reads."""


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    monkeypatch.setattr("time.sleep", lambda s: None)

    def call(*args: object) -> dict[str, Any]:
        with pytest.raises(SystemExit) as exit_:
            main([*map(str, args), "--json", "-q"])
        out, err = capsys.readouterr()
        assert exit_.value.code == 0, err
        value: dict[str, Any] = json.loads(out)
        return value

    return call


def generate(folder: object, **options: object) -> list[int]:
    model = loader.from_pretrained(folder, kernels="torch", **options)
    inputs = loader.load_tokenizer(model.name_or_path)(PROMPT, return_tensors="pt")
    ids: list[int] = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()
    return ids


def sent_per_expert(hub: HubServer, folder: Path) -> dict[tuple[int, int], int]:
    """Return the bytes sent for each expert."""
    sent = {}
    for layer in Artifact.open(folder).index.layers:
        ranges = hub.ranges(layer.file)
        for e in layer.experts:
            overlaps = (
                min(end, e.offset + e.length) - max(begin, e.offset) for begin, end in ranges
            )
            sent[e.layer, e.expert] = sum(max(0, n) for n in overlaps)
    return sent


def test_round_trip(
    hub: HubServer, example_folder: Path, tmp_path: Path, run: Callable[..., dict[str, Any]]
) -> None:
    hub.add(SOURCE, example_folder)
    out = tmp_path / "out"
    run(
        "convert",
        SOURCE,
        "-o",
        out,
        "--solver",
        "hqq",
        "--max-disk",
        "17MB",
        "--upload-repo",
        REPO,
        "--license",
        "apache-2.0",
    )
    assert sum(p.stat().st_size for p in example_folder.glob("*.safetensors")) > 17_000_000
    remote, local = run("inspect", REPO, "--experts"), run("inspect", out, "--experts")
    assert remote.pop("repository") == f"{REPO}@{hub.head(REPO).oid}"
    assert remote == local
    hub.requests.clear()
    assert generate(REPO, lazy=True) == generate(out)
    sent = sent_per_expert(hub, out)
    lengths = {
        (e.layer, e.expert): e.length for x in Artifact.open(out).index.layers for e in x.experts
    }
    assert sum(sent.values()) > 0
    assert all(sent[key] <= lengths[key] for key in sent)


def test_a_killed_process_leaves_only_good_experts_and_a_later_start_goes_on(
    hub: HubServer, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    hub.add(REPO, converted("2bit"))
    environ = os.environ | hub.environ(tmp_path / "hf-home") | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", LAZY_PROCESS], env=environ, stdout=subprocess.PIPE
    )
    assert process.stdout
    assert process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    lazy = LazyFolder.open(REPO)
    index = lazy.artifact.index
    there = [
        (e.layer, e.expert)
        for layer in index.layers
        for e in layer.experts
        if lazy.has(e.layer, e.expert)
    ]
    assert there
    hub.requests.clear()
    with HubReader(lazy, check="sha256", fill=False) as reader:
        for key in there:
            reader.read(*key)
        assert reader.fetched_bytes == 0
        for layer in index.layers:
            for e in layer.experts:
                reader.read(e.layer, e.expert)
    assert all(sent_per_expert(hub, converted("2bit"))[key] == 0 for key in there)
    assert verify_folder(lazy.path, read_data=True).problems == []


def test_two_readers_of_one_folder_both_give_the_right_bytes(
    hub: HubServer, converted: Callable[[str], Path]
) -> None:
    hub.add(REPO, converted("2bit"))
    with HubReader(LazyFolder.open(REPO)) as one, HubReader(LazyFolder.open(REPO)) as two:
        for layer in reversed(one.artifact.index.layers):
            for e in layer.experts:
                assert one.read(e.layer, e.expert).equal(two.read(e.layer, e.expert))
    assert verify_folder(one.artifact.folder, read_data=True).problems == []


@pytest.mark.parametrize(
    "fault", ["drop", "short", "shift", "ignore_range", "damage", "busy", "slow"]
)
def test_tokens_are_right_whatever_the_line_does(
    hub: HubServer, converted: Callable[[str], Path], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, converted("2bit"))
    LazyFolder.open(REPO, retries=Retries(attempts=2, wait=lambda s: None))
    if fault == "slow":
        hub.bytes_per_s = 20e6
    for layer in Artifact.open(converted("2bit")).index.layers:
        if fault == "busy":
            hub.faults.status(429, layer.file, Retry_After="0")
            hub.faults.status(503, layer.file, Retry_After="0")
        elif fault != "slow":
            arguments = {"drop": {"after": 3000}, "damage": {"at": 500}}.get(fault, {})
            getattr(hub.faults, fault)(layer.file, **arguments)
    monkeypatch.setattr("formats.hub.ranges.Retries.pause", lambda self, failures, asked_s: True)
    assert generate(REPO, lazy=True) == generate(converted("2bit"))


def test_the_token_stays_with_the_hub(hub: HubServer, converted: Callable[[str], Path]) -> None:
    hub.add(REPO, converted("2bit"), private=True)
    generate(REPO, lazy=True)
    assert any(r.host == "cdn" for r in hub.requests)
    assert all(r.token == (r.host == "hub") for r in hub.requests)


def test_hf_download_and_safe_open_work_on_what_is_published(
    hub: HubServer,
    converted: Callable[[str], Path],
    tmp_path: Path,
    run: Callable[..., dict[str, Any]],
) -> None:
    run("upload", converted("2bit"), REPO, "--license", "apache-2.0")
    target = tmp_path / "downloaded"
    command = [
        str(Path(sys.executable).parent / "hf"),
        "download",
        REPO,
        "--local-dir",
        str(target),
    ]
    subprocess.run(
        command,
        env=os.environ | hub.environ(tmp_path / "other-home"),
        check=True,
        capture_output=True,
    )
    assert verify_folder(target, read_data=True).problems == []
    for path in [target / "trunk.safetensors", *(target / "experts").iterdir()]:
        with safe_open(path, "pt") as file:
            assert all(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118


def test_plain_transformers_refuses_what_is_published(
    hub: HubServer,
    converted: Callable[[str], Path],
    tmp_path: Path,
    run: Callable[..., dict[str, Any]],
) -> None:
    run("upload", converted("2bit"), REPO, "--license", "apache-2.0")
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({REPO!r})"
    environ = os.environ | hub.environ(tmp_path / "other-home")
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert done.returncode
    assert (
        "does not appear to have a file named pytorch_model.bin or model.safetensors" in done.stderr
    )
