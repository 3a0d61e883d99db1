"""Measure the time to the first token of a model on the Hub: whole download against lazy loading,
at a given speed of the line.

The Hub is the loopback Hub of the tests, in its own process. Each run is a process with an empty
cache; its time starts at `from_pretrained`. A prompt of several tokens uses most of a layer's
experts, so the prompt's length decides how much time lazy loading saves. `again` is a lazy start
after an earlier one has fetched every expert.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [os.fspath(ROOT / "tests" / "support" / "hub"), os.fspath(ROOT)]
REPO = "me/model"


def main() -> None:
    """Print a table; --serve and --measure are the processes that it starts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a converted folder")
    parser.add_argument("--mb-per-s", type=float, default=100)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--scratch", type=Path, help="folder for the temporary caches")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--measure", metavar="JSON", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        _serve(options.folder, options.mb_per_s)
    elif options.measure:
        print(json.dumps(_measure(**json.loads(options.measure))))
    else:
        _compare(options)


def _compare(options: argparse.Namespace) -> None:
    size = sum(p.stat().st_size for p in options.folder.rglob("*") if p.is_file())
    print(
        f"{size / 1e9:.2f} GB at {options.mb_per_s:.0f} MB/s: {size / options.mb_per_s / 1e6:.1f} s"
    )
    print(
        "| run | prompt | first token, s | fetched by then, MB | all tokens, s "
        "|\n|---|---|---|---|---|"
    )
    with _hub(options) as environ:
        for prompt in options.prompts:
            for run in ("whole", "lazy"):
                with tempfile.TemporaryDirectory(dir=options.scratch) as home:
                    _report(run, options, environ | {"HF_HOME": home}, prompt)
        with tempfile.TemporaryDirectory(dir=options.scratch) as home:
            _run(options, environ | {"HF_HOME": home}, lazy=True, prompt=1, wait=True)
            _report("again", options, environ | {"HF_HOME": home}, options.prompts[-1])


def _report(run: str, options: argparse.Namespace, environ: dict[str, str], prompt: int) -> None:
    found = _run(options, environ, lazy=run != "whole", prompt=prompt)
    fetched = f"{found['fetched'] / 1e6:.0f}" if found["fetched"] is not None else "all"
    print(
        f"| {run} | {prompt} | {found['first_s']:.1f} | {fetched} | {found['all_s']:.1f} |",
        flush=True,
    )


def _run(options: argparse.Namespace, environ: dict[str, str], **what: Any) -> Any:
    command = [
        sys.executable,
        __file__,
        str(options.folder),
        "--measure",
        json.dumps(what | {"tokens": options.tokens}),
    ]
    done = subprocess.run(
        command, env=environ, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    return json.loads(done.stdout)


def _measure(lazy: bool, prompt: int, tokens: int, wait: bool = False) -> dict[str, Any]:
    """Load REPO and generate; return seconds and the experts' bytes at the first token."""
    import torch
    import transformers  # noqa: F401  (its import is not timed)

    import loader

    there: dict[str, int] = {}
    begin_s = time.perf_counter()
    model = loader.from_pretrained(
        REPO,
        lazy=lazy,
        ram_cache="1TiB",
        progress=lambda stage, done, total: there.update({stage: done}),
    )
    times: list[tuple[float, int | None]] = []

    class Clock:
        def put(self, value: Any) -> None:
            times.append((time.perf_counter() - begin_s, there.get("experts") if lazy else None))

        def end(self) -> None:
            """Called last."""

    ids = torch.randint(100, 1000, (1, prompt), generator=torch.Generator().manual_seed(7))
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        streamer=Clock(),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
    while wait and not list(Path(os.environ["HF_HOME"]).glob("moe-convert/*/*/moe_index.json")):
        time.sleep(0.1)
    return {"first_s": times[1][0], "fetched": times[1][1], "all_s": times[-1][0]}


@contextmanager
def _hub(options: argparse.Namespace) -> Iterator[dict[str, str]]:
    """Yield the environment variables of a process that uses a Hub with the folder."""
    command = [
        sys.executable,
        __file__,
        str(options.folder),
        "--serve",
        "--mb-per-s",
        str(options.mb_per_s),
    ]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdout and server.stdin
    try:
        yield os.environ | json.loads(server.stdout.readline())
    finally:
        server.stdin.close()
        server.wait()


def _serve(folder: Path, mb_per_s: float) -> None:
    from hub_server import HubServer

    with HubServer() as hub:
        hub.add(REPO, folder)
        hub.bytes_per_s = mb_per_s * 1e6
        print(json.dumps(hub.environ(Path("/nowhere"))), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
