import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
from project_paths import ROOT

from formats.artifact import Artifact
from loader.budget.ram import RESERVE_BYTES, ram_budget
from loader.planning.memory_plan import ModelSizes
from loader.serving.context import ContextSize

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")


@pytest.fixture(autouse=True)
def without_a_key(monkeypatch):
    monkeypatch.delenv("MOE_CONVERT_API_KEY", raising=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.com"])
def test_other_hosts_without_a_key_are_refused(run_command, converted, host):
    code, out, err = run_command("serve", converted("2bit"), "--host", host)
    assert (code, out) == (2, "")
    assert host in err and "--api-key-file" in err and "MOE_CONVERT_API_KEY" in err


@pytest.mark.parametrize("key", ["", "two words", "schlüssel"])
def test_keys_that_no_header_carries_are_refused(run_command, converted, key, tmp_path):
    file = tmp_path / "key"
    file.write_text(f"{key}\n", encoding="utf-8")
    code, _, err = run_command("serve", converted("2bit"), "--api-key-file", file)
    assert code == 2 and "the API key must be" in err


def test_key_is_given_in_one_way(run_command, converted, tmp_path):
    file = tmp_path / "key"
    file.write_text("secret")
    code, _, err = run_command(
        "serve", converted("2bit"), "--api-key", "other", "--api-key-file", file
    )
    assert code == 2 and "not both" in err


def test_port_that_is_taken_is_named_before_the_model_is_loaded(
    run_command, converted, monkeypatch
):
    monkeypatch.setattr(
        "loader.from_pretrained", lambda *_, **__: pytest.fail("the model was loaded")
    )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = run_command("serve", converted("2bit"), "--port", port)
    assert code == 1 and f"port {port}" in err


def test_context_beyond_the_model_is_refused(run_command, converted):
    code, _, err = run_command("serve", converted("2bit"), "--max-context", 513)
    assert code == 2 and "512" in err


def test_folder_that_is_not_converted_is_named(run_command, example_folder):
    code, _, err = run_command("serve", example_folder)
    assert code == 1 and f"moe-convert convert {example_folder}" in err.replace("\n", " ")


def test_missing_packages_are_named(run_command, converted, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    code, _, err = run_command("serve", converted("2bit"))
    assert code == 1 and "moe-convert[serve]" in err


def test_position_of_the_context_takes_what_plan_says(converted):
    size = ContextSize(converted("2bit"))
    assert (
        size.position_bytes
        == ModelSizes.of_folder(Artifact.open(converted("2bit"))).kv_per_position
    )
    narrow = ContextSize(converted("2bit"), 8)
    sizes = ModelSizes.of_folder(Artifact.open(converted("2bit")), 8)
    assert narrow.position_bytes == sizes.kv_per_position < 0.6 * size.position_bytes
    assert (size.max_tokens, size.chosen(None), size.chosen(100)) == (512, 512, 100)


def test_automatic_budget_leaves_free_what_is_reserved(converted, monkeypatch):
    monkeypatch.setattr("loader.budget.ram.available_memory", lambda: (4 << 30, 4 << 30))
    artifact = Artifact.open(converted("2bit"))
    budget = (4 << 30) - RESERVE_BYTES - artifact.index.trunk.size_bytes
    assert ram_budget("auto", artifact) == budget
    assert ram_budget("auto", artifact, reserve_bytes=1 << 30) == budget - (1 << 30)
    assert ram_budget("1GiB", artifact, reserve_bytes=1 << 30) == 1 << 30


def test_plan_counts_prefix_caches(run_command, converted):
    def plan(*options):
        speeds = (
            "--disk",
            "2",
            "--memory",
            "20",
            "--ram",
            "600MB",
            "--ctx",
            "256",
            "--prompt",
            "32",
        )
        code, out, _ = run_command("plan", converted("2bit"), *speeds, *options)
        assert code == 0
        return out

    without, with_them = (
        json.loads(plan(*o, "--json"))["plans"][0] for o in ((), ("--prefix-cache", "64MiB"))
    )
    assert without["prefix_bytes"] == 0 and with_them["prefix_bytes"] == 64 << 20
    assert without["cache_bytes"] - with_them["cache_bytes"] == 64 << 20
    assert "prefix caches" in plan("--prefix-cache", "64MiB") and "prefix caches" not in plan()


def test_sigterm_ends_a_server_with_a_stream_under_way(converted):
    """The server is its own process; its key comes from the environment."""
    command = [
        sys.executable,
        "-m",
        "converter",
        "serve",
        str(converted("2bit")),
        "--port",
        "0",
        "--model-name",
        "tiny",
        "--prefix-cache",
        "64MiB",
    ]
    environment = {**os.environ, "MOE_CONVERT_API_KEY": "secret"}
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        said = ""
        while not (found := re.search(r"serving 'tiny' on (http://127\.0\.0\.1:\d+)/v1", said)):
            line = server.stderr.readline()
            assert line, said
            said += line
        body = {"model": "tiny", "prompt": "So Jonah arose", "max_tokens": 480, "stream": True}
        headers = {"Authorization": "Bearer secret"}
        url = f"{found[1]}/v1/completions"
        assert httpx.post(url, json=body).status_code == 401
        with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as stream:
            chunks = stream.iter_lines()
            next(chunks)
            server.send_signal(signal.SIGTERM)
            last = [line for line in chunks if line][-1]
        # It ended in order, or was told why not.
        assert last == "data: [DONE]" or "the server is about to end" in last
        assert server.wait(timeout=10) == 0
        said = server.stderr.read()
        assert "no chat template" in said and "the server has stopped" in said
    finally:
        server.kill()
        server.wait()
        server.stderr.close()
