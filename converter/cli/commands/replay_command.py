"""`moe-convert replay`: simulates cache policies, sizes and prefetch on a routing trace."""

from pathlib import Path

import click

from converter.cli.options import shared_options
from converter.cli.options.plot_option import check_plot, with_plot_option
from converter.cli.show.console import GB, Output, output_options
from converter.cli.show.replay_plot import plot_replay
from converter.cli.show.replay_tables import tables_of


def _numbers(_ctx: click.Context, _param: click.Parameter, value: str | None) -> list[int] | None:
    try:
        return value if value is None else sorted({int(part) for part in value.split(",")})
    except ValueError:
        raise click.BadParameter(
            f"{value!r}: expected numbers separated by commas, such as 2,4,6"
        ) from None


def _policies(_ctx: click.Context, _param: click.Parameter, value: str) -> list[str]:
    from loader.experts.policy import POLICIES

    names = list(dict.fromkeys(value.split(",")))
    if unknown := [name for name in names if name not in (*POLICIES, "fixed")]:
        raise click.BadParameter(
            f"{unknown[0]!r} is unknown; known are {', '.join(POLICIES)}, fixed"
        )
    return names


@click.command(
    "replay",
    epilog="""\b
Examples:
  moe-convert replay trace.zst
  moe-convert replay trace.zst --policy lru --slots 4 --by-layer
  moe-convert replay trace.zst --disk 3.5 --compute-ms 2 --guesses 0,1,2
  moe-convert replay new.zst --policy lru,fixed --choose-from old.zst
  moe-convert replay trace.zst --plot replay.svg""",
)
@click.argument("trace", type=click.Path(path_type=Path))
@click.option(
    "--policy",
    "policies",
    callback=_policies,
    metavar="NAME,...",
    default="lrfu,lru,lfu",
    show_default=True,
    help="Eviction policies: lrfu, lru, lfu, fixed. fixed never evicts and holds the experts that"
    " --choose-from used most.",
)
@click.option(
    "--slots",
    callback=_numbers,
    metavar="N,...",
    help="Cache slots per layer, such as 2,4,6 [default: each size from the experts of one token"
    " to all but one].",
)
@click.option(
    "--shares",
    type=click.Choice(["equal", "chosen"]),
    default="equal",
    show_default=True,
    help="Division of the slots among layers. equal: the same for each layer. chosen: the same"
    " total, divided so that --choose-from reads least.",
)
@click.option(
    "--choose-from",
    type=shared_options.FILE,
    metavar="TRACE",
    help="Trace of another text, for --policy fixed and --shares chosen.",
)
@click.option(
    "--guesses",
    callback=_numbers,
    metavar="N,...",
    default="0,1,2",
    show_default=True,
    help="Prefetched experts per layer, at most.",
)
@click.option(
    "--norm",
    type=click.Choice(["this", "next"]),
    default="next",
    show_default=True,
    help="Norm weight used for the prediction: of the predicting layer, or of the next layer.",
)
@click.option(
    "--disk",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GB/s",
    help="Read speed of misses from the disk.",
)
@click.option(
    "--link",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GB/s",
    help="Copy speed of misses over a link such as PCIe.",
)
@click.option(
    "--compute-ms",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    metavar="MS",
    help="Computing time of a layer, in milliseconds.",
)
@click.option("--by-layer", is_flag=True, help="Show the hit ratio and recall of each layer.")
@with_plot_option("hit ratio over slots and recall over guesses")
@output_options(interrupted="nothing was changed")
def command(
    trace: Path,
    policies: list[str],
    slots: list[int] | None,
    shares: str,
    choose_from: Path | None,
    guesses: list[int],
    norm: str,
    disk: float | None,
    link: float | None,
    compute_ms: float,
    by_layer: bool,
    plot: Path | None,
    output: Output,
) -> None:
    """Simulate expert caches on TRACE: hit ratio, bytes read, and the speed they allow.

    The command tries every combination of --policy, --slots and --guesses. belady is the optimal
    policy; it needs to know future requests. The cache starts empty and is kept over the whole
    trace. The speed is an upper bound for one token at a time: each layer waits for its misses, and
    the next layer's predictions are read while it computes.
    """
    if choose_from is None and (shares == "chosen" or "fixed" in policies):
        raise click.UsageError("--policy fixed and --shares chosen need --choose-from TRACE")
    check_plot(plot, [trace, *([choose_from] if choose_from else [])])
    from loader.traces.replay_report import Settings, replay_trace
    from loader.traces.trace import read_trace

    read = read_trace(trace)
    chosen = read.experts.shape[2]
    count = read.header.architecture.num_local_experts
    numbers = list(range(chosen, count)) or [count] if slots is None else slots
    if wrong := [n for n in numbers if not 0 <= n <= count]:
        raise click.UsageError(f"--slots {wrong[0]}: this model has {count} experts per layer")
    if wrong := [n for n in guesses if not 0 <= n <= read.header.guesses]:
        raise click.UsageError(f"--guesses {wrong[0]}: the trace has 0 to {read.header.guesses}")
    speeds = {name: value * GB for name, value in (("disk", disk), ("link", link)) if value}
    other = read_trace(choose_from) if choose_from else None
    if other and other.header.architecture != read.header.architecture:
        raise click.UsageError(f"--choose-from {choose_from}: not the same model as {trace}")
    settings = Settings(
        policies=policies,
        slots=numbers,
        guesses=guesses,
        next_norm=norm == "next",
        bytes_per_s=speeds,
        compute_s=compute_ms / 1000,
        choose_from=other,
        equal_shares=shares == "equal",
    )
    report = replay_trace(read, settings, progress=output.note)
    if plot:
        plot_replay(report, plot)
    output.result(
        {"trace": str(trace), **report}, tables_of(report, list(speeds), by_layer=by_layer)
    )
