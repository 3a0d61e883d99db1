"""Plot of a replay: hit ratio over slots for each policy, recall over guesses."""

from pathlib import Path
from typing import Any

from converter.cli.show.plot_file import save_plot


def plot_replay(report: dict[str, Any], path: Path) -> None:
    """Plot a report of `replay_trace` into `path`, as SVG or PNG by its suffix."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # Figure, not pyplot, needs no display and keeps no global state.
    figure = Figure(figsize=(10, 4), layout="constrained")
    hits, guesses = figure.subplots(1, 2)
    lines: dict[str, list[tuple[int, float]]] = {}
    for run in report["runs"]:
        lines.setdefault(run["policy"], []).append((run["slots"], run["hit_ratio"]))
    for policy, points in lines.items():
        best = policy == "belady"
        hits.plot(
            *zip(*points, strict=True),
            label=f"{policy} (optimum)" if best else policy,
            color="black" if best else None,
            linestyle="--" if best else "-",
            marker="o",
            markersize=4,
        )
    hits.set(xlabel="slots a layer", ylabel="hit ratio", title=f"{report['model']}: cache")
    for (norm, layers), marker in zip(report["recall"].items(), "os", strict=True):
        if layers:
            means = [sum(column) / len(layers) for column in zip(*layers, strict=True)]
            guesses.plot(
                range(1, len(means) + 1),
                means,
                label=norm.replace("_", " layer's "),
                marker=marker,
                markersize=4,
            )
    chosen = report["chosen"]
    numbers = (
        range(1, len(report["recall"]["this_norm"][0]) + 1) if report["recall"]["this_norm"] else []
    )
    guesses.plot(
        numbers,
        [min(1, g / chosen) for g in numbers],
        color="black",
        linestyle="--",
        label="all guesses right",
    )
    guesses.set(
        xlabel="guesses a layer", ylabel="recall", title="guesses of the next layer's experts"
    )
    for axes in (hits, guesses):
        axes.set_ylim(0, 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    save_plot(figure, path)
