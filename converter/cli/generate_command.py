"""`moe-convert generate`: text from a converted model, as it comes."""

import sys
from pathlib import Path
from typing import Any

import click

from converter.cli.output import Output, gigabytes, output_options, table
from formats.errors import MoeConvertError


@click.command(
    "generate",
    epilog="""\b
Examples:
  moe-convert generate mixtral-2bit --prompt "Once upon a time" --max-new-tokens 64
  moe-convert generate mixtral-2bit --prompt - --ram-cache 6GiB --stats < question.txt
  moe-convert generate mixtral-2bit --prompt "Hello" --temperature 0.8 --seed 1""",
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="The text to go on from; - reads it from stdin.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), help="Sample at this temperature; 0 or none is greedy.")
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), help="Sample among the tokens with this total probability."
)
@click.option("--seed", type=int, help="Seed of the sampling.")
@click.option("--ram-cache", default="auto", show_default=True, metavar="SIZE", help="Memory for experts, e.g. 6GiB.")
@click.option(
    "--io",
    type=click.Choice(["auto", "mmap", "direct"]),
    default="auto",
    show_default=True,
    help="How to read experts.",
)
@click.option("--kernels", type=click.Choice(["auto", "native", "torch"]), default="auto", show_default=True)
@click.option("--stats", is_flag=True, help="Show cache hits, bytes read and speed on stderr.")
@output_options
def command(
    path: Path,
    prompt: str,
    max_new_tokens: int,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
    ram_cache: str,
    io: str,
    kernels: str,
    stats: bool,
    output: Output,
) -> None:
    """Generate text with the converted model in PATH.

    Greedy, unless --temperature or --top-p is given. The text streams to stdout.
    """
    import time

    import torch
    import transformers

    import loader

    transformers.utils.logging.disable_progress_bar()
    model = loader.from_pretrained(path, ram_cache=ram_cache, io=io, kernels=kernels)
    tokenizer = loader.load_tokenizer(path)
    inputs = tokenizer(sys.stdin.read() if prompt == "-" else prompt, return_tensors="pt")
    if not inputs["input_ids"].numel():
        raise MoeConvertError("the prompt is empty and the tokenizer adds no BOS token", "give a prompt")
    if seed is not None:
        torch.manual_seed(seed)
    clock = _Clock(
        None if output.as_json else transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    )
    started_s = time.perf_counter()
    with torch.inference_mode():
        ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            streamer=clock,
            # One prompt has no padding; without an id transformers warns at every call.
            pad_token_id=_pad_token(model, tokenizer),
            **_sampling(temperature, top_p),
        )
    prompt_tokens = inputs["input_ids"].shape[1]
    new_ids = ids[0, prompt_tokens:]
    result = {
        "text": tokenizer.decode(new_ids, skip_special_tokens=True),
        "prompt_tokens": prompt_tokens,
        "new_tokens": len(new_ids),
        **clock.times(started_s, len(new_ids)),
        "cache": model.moe_stats().as_dict(),
    }
    if output.as_json:
        output.result(result, "")
    if stats:
        click.echo(_stats_table(result), err=True)


class _Clock:
    """A streamer that notes when tokens come and passes them on."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer
        self._at_s: list[float] = []

    def put(self, value: Any) -> None:
        import time

        self._at_s.append(time.perf_counter())
        if self._streamer:
            self._streamer.put(value)

    def end(self) -> None:
        if self._streamer:
            self._streamer.end()

    def times(self, started_s: float, new_tokens: int) -> dict[str, float | None]:
        """Seconds to the first new token, and tokens a second after it (None where there was one only)."""
        # The first call brings the prompt.
        first_s, last_s = self._at_s[1], self._at_s[-1]
        rate = (new_tokens - 1) / (last_s - first_s) if new_tokens > 1 else None
        return {"first_token_s": first_s - started_s, "tokens_per_s": rate}


def _sampling(temperature: float | None, top_p: float | None) -> dict[str, Any]:
    """Arguments of `generate`; greedy ones also switch off what generation_config.json may ask for."""
    if temperature == 0 or (temperature is None and top_p is None):
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature or 1.0, "top_p": top_p or 1.0, "top_k": 0}


def _pad_token(model: Any, tokenizer: Any) -> int | None:
    """The padding token, or what stands in for it where the model has none."""
    for found in (model.generation_config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id):
        if found is not None:
            return int(found)
    return None


def _stats_table(result: dict[str, Any]) -> str:
    cache = result["cache"]
    rows: list[tuple[str, ...]] = [("layer", "hits", "misses", "hit ratio", "evictions", "read")]
    for name, layer in [*enumerate(cache["layers"]), ("all", cache)]:
        rows.append(
            (
                str(name),
                str(layer["hits"]),
                str(layer["misses"]),
                f"{layer['hit_ratio']:.3f}",
                str(layer["evictions"]),
                gigabytes(layer["bytes_read"]),
            )
        )
    rate = f"{result['tokens_per_s']:.2f} tokens/s" if result["tokens_per_s"] else "one token"
    return (
        f"{table(rows)}\n"
        f"{result['prompt_tokens']} prompt tokens, first token after {result['first_token_s']:.2f} s;"
        f" {result['new_tokens']} new tokens, {rate}\n"
        f"{cache['slots']} experts a layer fit the cache ({gigabytes(cache['slot_bytes'])})"
    )
