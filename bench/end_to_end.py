"""Speed of a converted model through transformers' generate, with everything in RAM.

decode   ms per token and layer of 64 tokens after a prompt of 32, compared with a streaming sum
         over the experts' bytes
parts    the share of the native call in that time, and the same with a lease of experts per layer
prompt   tokens per second of one forward pass over 512 tokens that computes the last logits
busy     (--busy) decode while a process spins on one core: median, p99 and largest ms per layer
compare  (--compare) decode with one optimization and without it, in turn
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from make_folder import kept_folder

import loader
from formats.artifact import Artifact
from loader.arithmetic import kernels
from loader.planning.memory_plan import ModelSizes


class Clock:
    """A streamer for generate that notes when each token comes.

    begin: called when the prompt's token and then `warm` tokens have come.
    """

    def __init__(self, begin: Callable[[], None] = lambda: None, warm: int = 0) -> None:
        self.times: list[float] = []
        self._begin = begin
        self._begin_at = 2 + warm

    def put(self, value: Any) -> None:
        """Called with the prompt, then with each token."""
        self.times.append(time.perf_counter())
        if len(self.times) == self._begin_at:
            self._begin()

    def end(self) -> None:
        """Called last."""

    def ms(self) -> list[float]:
        """ms of each token but the first, which the prompt's pass gives."""
        return [1e3 * (b - a) for a, b in zip(self.times[1:], self.times[2:], strict=False)]


def token_bytes(artifact: Artifact) -> int:
    """Return the bytes of weights that one token needs: its experts, attention and head."""
    sizes = ModelSizes.of_folder(artifact)
    a = artifact.architecture
    return sizes.trunk_read + sizes.all_experts * a.num_experts_per_tok // a.num_local_experts


class Bench:
    """A loaded model with its experts in RAM."""

    def __init__(self, folder: Path, tokens: int, prompt: int) -> None:
        self.model = loader.from_pretrained(folder, ram_cache="1TiB")
        self.tokens = tokens
        self.layers = self.model.config.num_hidden_layers
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(5, self.model.config.vocab_size, (1, prompt), generator=generator)
        layers = self.model.model.layers
        artifact = Artifact.open(folder)
        count = artifact.architecture.num_local_experts
        # One list of experts of one size each, for the sum; reading them also brings them into RAM.
        self.experts = []
        for number, layer in enumerate(layers):
            with layer.mlp.experts.cache.lease(number, range(count)) as lease:
                self.experts.append(list(lease.all().values()))
        self.token_bytes = token_bytes(artifact)

    def stream_gb_s(self) -> float:
        """The streaming sum over all experts."""
        begin = time.perf_counter()
        for experts in self.experts:
            kernels.stream_sum(experts)
        return sum(b.numel() for e in self.experts for b in e) / (time.perf_counter() - begin) / 1e9

    def decode_ms(self, clock: Clock | None = None) -> list[float]:
        """ms of each generated token."""
        clock = clock or Clock()
        self.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            max_new_tokens=self.tokens,
            min_new_tokens=self.tokens,
            do_sample=False,
            streamer=clock,
            pad_token_id=2,
        )
        return clock.ms()

    def decode(self, repeats: int) -> dict[str, Any]:
        """Medians over repetitions, each between two streaming sums."""
        self.decode_ms()
        rows, before = [], self.stream_gb_s()
        for _ in range(repeats):
            ms = statistics.median(self.decode_ms())
            after = self.stream_gb_s()
            stream = (before + after) / 2
            rows.append((ms / self.layers, stream, self.token_bytes / stream / 1e6 / ms))
            before = after
        best = min(rows)
        return {
            "ms_per_token": statistics.median(r[0] for r in rows) * self.layers,
            "ms_per_layer": statistics.median(r[0] for r in rows),
            "stream_gb_s": statistics.median(r[1] for r in rows),
            "share_of_stream": statistics.median(r[2] for r in rows),
            "best_ms_per_layer": best[0],
            "best_stream_gb_s": best[1],
            "over_bound_ms_per_layer": statistics.median(r[0] * (1 - r[2]) for r in rows),
        }

    def parts(self) -> dict[str, Any]:
        """ms per layer inside the one native call of a token, and elsewhere; and the same with a
        lease for each layer, as where experts come and go: one native call a layer.
        """
        decoder = self.model._serving._path._made[1]
        calls = {"native": [(decoder, "_run")]}
        native, ms = self._timed(calls)
        with replaced(decoder, "_is_resident", [False] * self.layers):
            leased, leased_ms = self._timed(calls)
        return native | {
            "rest": ms - native["native"],
            "leased_native": leased["native"],
            "leased_rest": leased_ms - leased["native"],
        }

    def _timed(self, calls: dict[str, list[tuple[Any, str]]]) -> tuple[dict[str, float], float]:
        """ms per token and layer inside each group of functions, and of the whole."""
        spent = dict.fromkeys(calls, 0.0)

        def timed(part: str, inner: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                begin = time.perf_counter()
                result = inner(*args, **kwargs)
                spent[part] += 1e3 * (time.perf_counter() - begin)
                return result

            return call

        clock = Clock(lambda: spent.update(dict.fromkeys(spent, 0.0)))
        with ExitStack() as stack:
            for part, functions in calls.items():
                for owner, name in functions:
                    stack.enter_context(replaced(owner, name, timed(part, getattr(owner, name))))
            ms = self.decode_ms(clock)
        per_layer = len(ms) * self.layers
        return {part: total / per_layer for part, total in spent.items()}, sum(ms) / per_layer

    def prompt(self, length: int, repeats: int) -> dict[str, Any]:
        """Tokens a second of a prompt."""
        ids = torch.randint(
            5, self.model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(1)
        )
        seconds = []
        for _ in range(repeats + 1):
            begin = time.perf_counter()
            with torch.inference_mode():
                self.model(ids, logits_to_keep=1, use_cache=True)
            seconds.append(time.perf_counter() - begin)
        return {
            "tokens": length,
            "tokens_per_s": length / statistics.median(seconds[1:]),
            "best_tokens_per_s": length / min(seconds[1:]),
        }

    def busy(self, repeats: int) -> dict[str, Any]:
        """ms per layer while another process spins on the first of our cores."""
        ms: list[float] = []
        with spinning():
            for _ in range(repeats):
                ms += self.decode_ms()
        ordered = sorted(one / self.layers for one in ms)
        return {
            "median_ms_per_layer": statistics.median(ordered),
            "p99_ms_per_layer": ordered[len(ordered) * 99 // 100],
            "max_ms_per_layer": ordered[-1],
        }

    def compare(self, measure: str, pairs: int) -> dict[str, Any]:
        """Median ms per layer with a measure and without it, in turn."""
        without = MEASURES[measure]
        results: dict[str, list[float]] = {"with": [], "without": []}
        for _ in range(pairs + 1):
            for name, context in (("with", nullcontext()), ("without", without())):
                with context:
                    results[name].append(statistics.median(self.decode_ms()) / self.layers)
        pairs_of = list(zip(results["with"][1:], results["without"][1:], strict=True))
        return {
            "measure": measure,
            "with_ms": statistics.median(a for a, _ in pairs_of),
            "without_ms": statistics.median(b for _, b in pairs_of),
            "saved_ms": statistics.median(b - a for a, b in pairs_of),
        }


@contextmanager
def spinning() -> Iterator[None]:
    """A process that keeps one core busy."""
    code = "import os\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set `owner.name` to `value` inside the context."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def transformers_code(*others: Any) -> Iterator[None]:
    """Let transformers' code compute single tokens inside the context; enter `others` too."""
    from loader.decode.path_counters import LeaveDecoder, Reason
    from loader.hf.decoder_path import DecoderPath

    def leave(*_: Any) -> Any:
        raise LeaveDecoder(Reason.PROMPT)

    with ExitStack() as stack:
        for context in (replaced(DecoderPath, "run", leave), *others):
            stack.enter_context(context)
        yield


def _measures() -> dict[str, Callable[[], Any]]:
    from loader.hf import growing_cache, served_model
    from loader.hf.modules import head

    return {
        "decoder": transformers_code,
        "torch-threads": lambda: transformers_code(
            replaced(served_model, "torch_threads_for", lambda tokens: nullcontext())
        ),
        "growing-cache": lambda: transformers_code(
            replaced(growing_cache.GrowingLayer, "update", growing_cache.DynamicLayer.update)
        ),
        "head": lambda: transformers_code(replaced(head, "MAX_BF16_TOKENS", 0)),
    }


MEASURES = _measures()


def main() -> None:
    """Run the parts and print a table, or one JSON object with --json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", help="converted folder (default: make one, 2bit)"
    )
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "moe-convert-bench"
    )
    parser.add_argument(
        "--layers", type=int, default=4, help="layers of the made model (default: 4)"
    )
    parser.add_argument(
        "--prompt", type=int, default=32, help="tokens before decoding (default: 32)"
    )
    parser.add_argument("--tokens", type=int, default=64, help="tokens to decode (default: 64)")
    parser.add_argument(
        "--long-prompt", type=int, default=512, help="tokens of the prompt part (default: 512)"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="repetitions of each part (default: 5)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        help="threads of the native kernels (default: one per core)",
    )
    parser.add_argument("--busy", action="store_true", help="also decode while a process spins")
    parser.add_argument(
        "--compare",
        action="append",
        choices=sorted(MEASURES),
        default=[],
        help="measure to compare; repeatable",
    )
    parser.add_argument(
        "--rival", help="shell command to run after each part; its output is printed"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    kernels.set_threads(options.threads)
    bench = Bench(
        options.folder or kept_folder(options.work, options.layers),
        options.tokens,
        options.prompt,
    )
    result: dict[str, Any] = {
        "kernels": kernels.describe(),
        "torch_threads": torch.get_num_threads(),
        "layers": bench.layers,
        "mb_per_token": bench.token_bytes / 1e6,
        "rival": [],
    }

    def note(part: str, row: dict[str, Any]) -> None:
        result.setdefault(part, []).append(row)
        text = "  ".join(
            f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
        )
        print(f"{part:8s} {text}", file=sys.stderr if options.json else sys.stdout, flush=True)
        if options.rival:
            done = subprocess.run(
                options.rival, shell=True, capture_output=True, text=True, check=False
            )
            result["rival"].append(done.stdout)
            print(
                done.stdout or done.stderr,
                file=sys.stderr if options.json else sys.stdout,
                flush=True,
            )

    note("decode", bench.decode(options.repeats))
    note("parts", bench.parts())
    if options.long_prompt:
        note("prompt", bench.prompt(options.long_prompt, options.repeats))
    for measure in options.compare:
        note("compare", bench.compare(measure, options.repeats))
    if options.busy:
        note("busy", bench.busy(options.repeats))
    note("decode", bench.decode(options.repeats))
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
