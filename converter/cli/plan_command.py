"""`moe-convert plan`: what fits where within a memory budget, and the tokens per second to expect."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from converter.cli import shared_options
from converter.cli.output import Output, output_options
from converter.cli.plan_sources import open_source
from converter.cli.plan_tables import text_of
from formats.errors import MoeConvertError
from formats.sizes import parse_size

if TYPE_CHECKING:
    from loader.plan import Machine, ModelSizes

GB = 10**9
SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of the experts in memory, where no budget is given."""
_SPEED = click.FloatRange(min=0, min_open=True)


@click.command(
    "plan",
    epilog="""\b
Examples:
  moe-convert plan mixtral-2bit
  moe-convert plan mixtral-2bit --ram 12GiB --ctx 8192 --trace mine.zst --verify
  moe-convert plan ./Mixtral-8x7B-v0.1 --recipe 3bit --ram 16GB
  moe-convert plan mistralai/Mixtral-8x7B-v0.1 --ram 16GB --disk 3.5
Exit code 4: not even the least fits; the message says how much is needed. GPU memory cannot be planned yet.""",
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--ram", metavar="SIZE", help="Memory for the whole process, e.g. 12GiB [default: a table over several budgets]."
)
@click.option("--ctx", type=click.IntRange(min=1), default=4096, show_default=True, help="Positions of the KV cache.")
@click.option(
    "--prompt", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens of the longest prompt."
)
@click.option(
    "--trace", type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A routing trace (moe-convert trace) to take hit ratios from [default: every expert is equally likely].",
)  # fmt: skip
@click.option(
    "--policy", type=click.Choice(["lrfu", "lru", "lfu"]), default="lrfu", show_default=True,
    help="Which experts leave first.",
)  # fmt: skip
@click.option("--disk", type=_SPEED, metavar="GB/s", help="Speed of the disk [default: measured for a second].")
@click.option("--memory", type=_SPEED, metavar="GB/s", help="Speed of the memory [default: measured].")
@click.option(
    "--recipe", "recipe_name", default="2bit", show_default=True, help="For a checkpoint that is not converted yet."
)
@shared_options.revision
@shared_options.token
@click.option("--verify", is_flag=True, help="Decode 32 tokens with each budget, and compare.")
@output_options
def command(path: Path, ram: str | None, output: Output, **options: Any) -> None:
    """Show what fits where, and the speed to expect, of PATH.

    PATH is a converted model or a checkpoint, in a folder or as owner/name on the Hub, or a config.json. Takes the
    numbers of index and headers, and reads some weights to measure the disk. The speed is one sequence's at
    the end of the context: the low end without any overlap of reading and computing, the high end with a perfect one.
    """
    from loader.plan import plan_memory, plan_shares

    context, prompt = options["ctx"], min(options["prompt"], options["ctx"])
    source = open_source(path, options["recipe_name"], options["revision"], options["token"])
    if options["verify"] and not source.converted:
        raise click.UsageError(f"--verify: {path} is not a converted folder")
    sizes = source.sizes
    machine = _machine(sizes, source.files, options)
    settings: dict[str, Any] = {
        "context": context,
        "prompt": prompt,
        "miss_ratios": _traced(options["trace"], sizes, options["policy"]) if options["trace"] else None,
    }
    if ram:
        plans = [plan_memory(sizes, machine, parse_size(ram, "--ram"), **settings)]
    else:
        plans = plan_shares(sizes, machine, SHARES, **settings)
    result: dict[str, Any] = {
        "path": str(path),
        "recipe": source.recipe,
        "layers": len(sizes.stored),
        "experts": sizes.architecture.num_local_experts,
        "expert_bytes": sizes.all_experts,
        "context": context,
        "prompt": prompt,
        "trace": options["trace"] and str(options["trace"]),
        **asdict(machine),
        "plans": [asdict(plan) for plan in plans],
    }
    if options["verify"] and source.converted:
        _verify(source.converted, result["plans"], prompt, context, options["policy"], output)
    output.result(result, text_of(result, detailed=bool(ram)))


def _machine(sizes: "ModelSizes", files: list[Path], options: dict[str, Any]) -> "Machine":
    """As the options say, else measured, the disk over the weights in `files`."""
    from loader.machine import disk_bytes_per_s, memory_bytes_per_s
    from loader.plan import Machine

    disk, memory = options["disk"], options["memory"]
    if not disk and not files:
        raise click.UsageError("there are no weights here to measure the disk with: say how fast it is, --disk GB/s")
    return Machine(
        memory_bytes_per_s=memory * GB if memory else memory_bytes_per_s(),
        disk_bytes_per_s=disk * GB if disk else disk_bytes_per_s(files, int(max(sizes.stored))),
    )


def _traced(trace: Path, sizes: "ModelSizes", policy: str) -> Any:
    from loader.plan import traced_miss_ratios
    from loader.policy import POLICIES
    from loader.trace import read_trace

    read = read_trace(trace)
    if read.header.architecture != sizes.architecture:
        raise MoeConvertError(f"{trace}: a trace of another model", "trace this one, or its original")
    return traced_miss_ratios(read, POLICIES[policy])


def _verify(folder: Path, plans: list[dict[str, Any]], prompt: int, context: int, policy: str, output: Output) -> None:
    """Adds what 32 tokens measured to each plan, as `verified`."""
    import transformers

    from loader.trial_run import try_out

    transformers.utils.logging.disable_progress_bar()
    for plan in plans:
        output.note(f"decoding with {plan['ram_bytes'] / GB:.2f} GB")
        run = try_out(folder, plan["cache_bytes"], prompt=min(prompt, max(1, context - 32)), policy=policy)
        plan["verified"] = asdict(run)
