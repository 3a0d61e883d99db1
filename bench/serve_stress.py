"""Run clients that hold conversations with a server on the loopback interface and often disconnect
in the middle of an answer.

    python bench/serve_stress.py FOLDER --seconds 300 --clients 4

Each complete answer is compared with the model's answer to the same conversation alone, without
prefix caches. The model is float32: in bfloat16 a prompt and single tokens round differently, and
that decides between equally likely tokens. Exit code 1 if an answer differs, a request fails, or
the server holds resources at the end.
"""

import argparse
import json
import random
import ssl
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import psutil
import torch

import loader
from loader.serving.engine import Engine, Limits
from loader.serving.http.app import AppOptions, build_app
from loader.serving.http.server import Server, bound_socket, url_of

TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
SYSTEM = "In the beginning God created the heaven and the earth, and the earth was without form."
OPENINGS = (
    "Jonah arose",
    "The king said",
    "And the ship",
    "He went out",
    "They cast lots",
    "The men feared",
)
FOLLOWING = ("And then they said", "But the LORD")
TOKENS = 16
CONTEXT = ssl.create_default_context()
"""One for all clients: each takes a megabyte, which would hide what the server keeps."""
PREFIX_BYTES = 3 << 20
"""Room for a few conversations: some are dropped."""


class Conversations:
    """Prompts of several turns and the answers that the model gives to them alone."""

    def __init__(self, url: str) -> None:
        self._prompts: list[list[dict[str, str]]] = []
        self._answers: list[str] = []
        for opening in OPENINGS:
            messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": opening}]
            for following in (*FOLLOWING, None):
                response = httpx.post(
                    f"{url}/v1/chat/completions", json=body(messages), timeout=600
                )
                answer = response.json()["choices"][0]["message"]["content"]
                self._prompts.append(messages)
                self._answers.append(answer)
                if following:
                    said = [
                        {"role": "assistant", "content": answer},
                        {"role": "user", "content": following},
                    ]
                    messages = [*messages, *said]

    def any(self, chance: random.Random) -> tuple[list[dict[str, str]], str]:
        """Return a prompt and its answer."""
        number = chance.randrange(len(self._prompts))
        return self._prompts[number], self._answers[number]


def body(messages: list[dict[str, str]], **options: object) -> dict[str, object]:
    return {"model": "m", "messages": messages, "max_tokens": TOKENS, "temperature": 0, **options}


class Clients:
    """Clients in threads; `counts` has all outcomes, `wrong` the wrong answers."""

    def __init__(self, url: str, conversations: Conversations, end_s: float) -> None:
        self._url = f"{url}/v1/chat/completions"
        self._conversations = conversations
        self._end_s = end_s
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    def run(self, seed: int) -> None:
        """Be one client."""
        chance = random.Random(seed)
        while time.monotonic() < self._end_s:
            try:
                with httpx.Client(timeout=120, verify=CONTEXT) as client:
                    self._visit(client, chance)
            except Exception as e:
                self.wrong.append(f"{type(e).__name__}: {e}")

    def _visit(self, client: httpx.Client, chance: random.Random) -> None:
        prompt, expected = self._conversations.any(chance)
        kind = chance.choice(
            [
                "whole",
                "stream",
                "stream",
                "leaves stream",
                "leaves stream",
                "leaves whole",
                "refused",
            ]
        )
        if kind == "refused":
            status = client.post(self._url, json=body(prompt, n=2)).status_code
            self._check(kind, str(status), "400")
        elif kind == "whole":
            response = client.post(self._url, json=body(prompt))
            self._answered(kind, response.status_code, response.text, expected)
        elif kind == "leaves whole":
            client.timeout = httpx.Timeout(120, read=chance.random() / 5)
            try:
                response = client.post(self._url, json=body(prompt))
                self._answered(kind, response.status_code, response.text, expected)
            except httpx.ReadTimeout:
                self.counts[kind] += 1
        else:
            self._stream(client, kind, chance, prompt, expected)

    def _stream(
        self,
        client: httpx.Client,
        kind: str,
        chance: random.Random,
        prompt: list[dict[str, str]],
        expected: str,
    ) -> None:
        leaves_after = chance.randrange(TOKENS) if kind == "leaves stream" else None
        text, is_ended = "", False
        with client.stream("POST", self._url, json=body(prompt, stream=True)) as stream:
            if stream.status_code == 429:
                self.counts["queue full"] += 1
                return
            for number, line in enumerate(line for line in stream.iter_lines() if line):
                if number == leaves_after:
                    self.counts[kind] += 1
                    return
                if line == "data: [DONE]":
                    is_ended = True
                    continue
                text += json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get(
                    "content", ""
                )
        self._check(kind, f"{text}{is_ended}", f"{expected}{True}")

    def _answered(self, kind: str, status: int, text: str, expected: str) -> None:
        if status == 429:
            self.counts["queue full"] += 1
        else:
            self._check(kind, json.loads(text)["choices"][0]["message"]["content"], expected)

    def _check(self, kind: str, found: str, expected: str) -> None:
        self.counts[kind] += 1
        if found != expected:
            self.wrong.append(f"{kind}: {found!r}, expected {expected!r}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    model = loader.from_pretrained(options.folder, dtype=torch.float32)
    tokenizer = loader.load_tokenizer(options.folder)
    with Running(model, tokenizer, prefix_bytes=0) as (url, _):
        conversations = Conversations(url)
    with Running(model, tokenizer, prefix_bytes=PREFIX_BYTES) as (url, engine):
        result = stress(url, engine, conversations, options)
    print(json.dumps(result, indent=1))
    return 0 if result["is_good"] else 1


def stress(
    url: str, engine: Engine, conversations: Conversations, options: argparse.Namespace
) -> dict[str, object]:
    """Return the result of the run; its `is_good` is True if all checks passed."""
    process = psutil.Process()
    clients = Clients(url, conversations, time.monotonic() + options.seconds)
    threads = [
        threading.Thread(target=clients.run, args=(options.seed + n,))
        for n in range(options.clients)
    ]
    for thread in threads:
        thread.start()
    # After a quarter of the time all that is kept is there.
    time.sleep(options.seconds / 4)
    early = (process.memory_info().rss, process.num_fds(), process.num_threads())
    for thread in threads:
        thread.join()
    while engine.gauges()["generations_running"] or engine.gauges()["queue_length"]:
        time.sleep(0.05)
    late = (process.memory_info().rss, process.num_fds(), process.num_threads())
    metrics = engine.metrics
    names = (
        "generations",
        "generations_cancelled",
        "generations_failed",
        "prompt_tokens",
        "prompt_tokens_cached",
    )
    gauges = engine.gauges()
    is_good = (
        not clients.wrong
        and metrics.value("generations_failed") == 0
        and gauges["prefix_cache_bytes"] <= PREFIX_BYTES
        and late[1] <= early[1] + 8
        and late[0] <= early[0] + (16 << 20)
    )
    return {
        "is_good": is_good,
        "seconds": options.seconds,
        "visits": dict(clients.counts),
        "wrong": clients.wrong[:10],
        **{name: metrics.value(name) for name in (*names, "generated_tokens")},
        **gauges,
        **{
            f"{name}_early": value
            for name, value in zip(("rss", "files", "threads"), early, strict=True)
        },
        **{
            f"{name}_late": value
            for name, value in zip(("rss", "files", "threads"), late, strict=True)
        },
    }


class Running:
    """A server in a thread; gives its URL and its engine."""

    def __init__(self, model: object, tokenizer: object, *, prefix_bytes: int) -> None:
        self._engine = Engine(model, tokenizer, Limits(512, 8, prefix_bytes))
        app = build_app(self._engine, tokenizer, AppOptions("m", template=TEMPLATE))
        self._listening = bound_socket("127.0.0.1", 0)
        self._server = Server(app, self._engine)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._listening]}
        )

    def __enter__(self) -> tuple[str, Engine]:
        self._thread.start()
        return url_of(self._listening), self._engine

    def __exit__(self, *_: object) -> None:
        self._engine.close(finish_s=1)
        self._server.should_exit = True
        self._thread.join()


if __name__ == "__main__":
    sys.exit(main())
