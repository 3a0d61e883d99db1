"""`moe-convert plan`: shows what fits in a memory budget, and the speed to expect."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from converter.cli.options import shared_options
from converter.cli.show.console import GB, Output, output_options
from converter.cli.show.plan_tables import text_of
from converter.cli.steps.plan_machine import check_options, gpu_machine, has_gpu, ram_machine
from converter.cli.steps.plan_sources import open_source
from formats.errors import MoeConvertError
from formats.sizes import parse_size

if TYPE_CHECKING:
    from loader.planning.memory_plan import ModelSizes, Plan

SHARES = (0.25, 0.5, 0.75, 1.0)
"""Shares of the experts in RAM that are planned if no budget is given."""
_SPEED = click.FloatRange(min=0, min_open=True)


@click.command(
    "plan",
    epilog="""\b
Examples:
  moe-convert plan mixtral-2bit
  moe-convert plan mixtral-2bit --ram 12GiB --trace mine.zst --verify
  moe-convert plan ./Mixtral-8x7B-v0.1 --recipe 3bit --ram 16GB
  moe-convert plan mistralai/Mixtral-8x7B-v0.1 --ram 16GB --disk 3.5
  moe-convert plan mixtral-2bit --vram 12GiB
  moe-convert plan mixtral-2bit --vram 8GiB --link 12 --gpu-bandwidth 360

Exit code 4: the budget is below the minimum; the message gives the minimum.""",
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--ram",
    metavar="SIZE",
    help="RAM budget of the whole process, such as 12GiB [default: a table of several budgets].",
)
@click.option(
    "--vram",
    metavar="SIZE",
    help="GPU memory budget, such as 12GiB, for trunk, KV cache and cached experts. Without --ram,"
    " all experts are in RAM.",
)
@click.option(
    "--ctx",
    type=click.IntRange(min=1),
    default=4096,
    show_default=True,
    metavar="TOKENS",
    help="Length of the KV cache, in tokens.",
)
@shared_options.kv_bits
@shared_options.prefix_cache(
    "0", "Memory for the prefix caches of `moe-convert serve`, such as 1GiB."
)
@click.option(
    "--prompt",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    metavar="TOKENS",
    help="Length of the longest prompt, in tokens.",
)
@click.option(
    "--trace",
    type=shared_options.FILE,
    metavar="FILE",
    help="Routing trace that gives the hit ratios (see `moe-convert trace`) [default: every expert"
    " is equally likely].",
)
@shared_options.policy
@click.option(
    "--disk",
    type=_SPEED,
    metavar="GB/s",
    help="Disk read speed [default: measured for one second].",
)
@click.option("--memory", type=_SPEED, metavar="GB/s", help="RAM bandwidth [default: measured].")
@click.option(
    "--link",
    type=_SPEED,
    metavar="GB/s",
    help="Speed of copies from RAM to the GPU [default: measured; needs a GPU].",
)
@click.option(
    "--gpu-bandwidth",
    type=_SPEED,
    metavar="GB/s",
    help="GPU memory bandwidth [default: measured; needs a GPU].",
)
@click.option(
    "--recipe",
    "recipe_name",
    default="2bit",
    show_default=True,
    metavar="NAME|FILE.json",
    help="Recipe to plan for, if PATH is not converted (see `moe-convert convert`).",
)
@shared_options.revision
@shared_options.token
@click.option(
    "--verify", is_flag=True, help="Decode 32 tokens with each budget and show the measured speed."
)
@shared_options.check
@output_options(interrupted="nothing was changed")
def command(path: Path, ram: str | None, vram: str | None, output: Output, **options: Any) -> None:
    """Show how much of the model PATH fits in RAM and GPU memory, and the speed to expect.

    PATH is a converted model or a checkpoint, in a folder or as owner/name on the Hub, or a
    config.json. The command reads index and headers, and some weights to measure the disk.

    The speed is for one sequence at the end of the context. Its lower end assumes that reading and
    computing never overlap, its upper end that they overlap perfectly. With --vram the lower end is
    half of the upper end: no GPU was measured (docs/plan.md).
    """
    check_options(options, vram=bool(vram))
    context = options["ctx"]
    prompt = min(options["prompt"], context)
    source = open_source(
        path,
        options["recipe_name"],
        options["revision"],
        options["token"],
        options["kv_bits"],
    )
    if options["verify"] and not source.converted:
        raise click.UsageError(f"--verify: {path} is not a converted folder")
    if options["verify"] and vram and not has_gpu():
        raise click.UsageError("--verify with --vram needs a GPU, and this machine has none")
    sizes = replace(source.sizes, prefix=options["prefix_cache"])
    if vram:
        speeds, plans = _gpu_plans(sizes, source.files, vram, ram, context, prompt, options)
    else:
        speeds, plans = _plans(sizes, source.files, ram, context, prompt, options)
    result: dict[str, Any] = {
        "path": str(path),
        "recipe": source.recipe,
        "layers": len(sizes.stored),
        "experts": sizes.architecture.num_local_experts,
        "expert_bytes": sizes.all_experts,
        "context": context,
        "prompt": prompt,
        "kv_bits": options["kv_bits"],
        "trace": options["trace"] and str(options["trace"]),
        **speeds,
        "plans": [asdict(plan) for plan in plans],
    }
    if options["verify"] and source.converted:
        _verify(source.converted, result["plans"], prompt, context, options, output)
    output.result(result, text_of(result, detailed=bool(ram or vram)))


def _plans(
    sizes: "ModelSizes",
    files: list[Path],
    ram: str | None,
    context: int,
    prompt: int,
    options: dict[str, Any],
) -> "tuple[dict[str, Any], Sequence[Plan]]":
    """Return the speeds, and the plan for `ram`, or one for each of SHARES."""
    from loader.experts.policy import POLICIES
    from loader.planning.memory_plan import plan_memory, plan_shares, traced_miss_ratios

    trace = _traced(options["trace"], sizes)
    ram_bytes = parse_size(ram, "--ram") if ram else None
    ratios = trace and traced_miss_ratios(trace, POLICIES[options["policy"]])
    settings: dict[str, Any] = {"context": context, "prompt": prompt, "miss_ratios": ratios}
    speeds = ram_machine(sizes, files, options)
    if ram_bytes:
        return asdict(speeds), [plan_memory(sizes, speeds, ram_bytes, **settings)]
    return asdict(speeds), plan_shares(sizes, speeds, SHARES, **settings)


def _gpu_plans(
    sizes: "ModelSizes",
    files: list[Path],
    vram: str,
    ram: str | None,
    context: int,
    prompt: int,
    options: dict[str, Any],
) -> "tuple[dict[str, Any], Sequence[Plan]]":
    """Return the speeds, and the plan for `vram` and `ram`."""
    from loader.experts.policy import POLICIES
    from loader.planning.gpu_plan import plan_gpu
    from loader.traces.tier_misses import traced_tier_misses, uniform_tier_misses

    vram_bytes = parse_size(vram, "--vram")
    ram_bytes = parse_size(ram, "--ram") if ram else None
    policy = POLICIES[options["policy"]]
    trace = _traced(options["trace"], sizes)
    misses = (
        traced_tier_misses(trace, policy)
        if trace
        else uniform_tier_misses(sizes.architecture, policy)
    )
    speeds = gpu_machine(sizes, files, options, needs_disk=bool(ram))
    plan = plan_gpu(
        sizes, speeds, vram_bytes, ram_bytes, context=context, prompt=prompt, tier_misses=misses
    )
    return asdict(speeds), [plan]


def _traced(path: Path | None, sizes: "ModelSizes") -> Any:
    from loader.traces.trace import read_trace

    if path is None:
        return None
    read = read_trace(path)
    if read.header.architecture != sizes.architecture:
        raise MoeConvertError(
            f"{path}: a trace of another model", "record a trace of this model or its original"
        )
    return read


def _verify(
    folder: Path,
    plans: list[dict[str, Any]],
    prompt: int,
    context: int,
    options: dict[str, Any],
    output: Output,
) -> None:
    """Decode 32 tokens with each plan and store the measurement in it as `verified`."""
    import transformers

    from loader.planning.trial_run import try_out

    transformers.utils.logging.disable_progress_bar()
    for plan in plans:
        output.note(f"decoding with {plan['ram_bytes'] / GB:.2f} GB")
        gpu_cache = plan["gpu"]["cache_bytes"] if "gpu" in plan else None
        run = try_out(
            folder, plan["cache_bytes"], gpu_cache, prompt=min(prompt, max(1, context - 32)),
            policy=options["policy"], check=options["check"], kv_bits=options["kv_bits"],
        )  # fmt: skip
        plan["verified"] = asdict(run)
