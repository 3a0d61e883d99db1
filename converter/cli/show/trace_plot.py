"""Heat map of a trace: how often each layer uses each expert."""

from pathlib import Path
from typing import TYPE_CHECKING

from converter.cli.show.plot_file import save_plot

if TYPE_CHECKING:
    from loader.traces.trace import Trace


def plot_trace(trace: "Trace", path: Path) -> None:
    """Draw the share of tokens that use each expert, by layer, into `path`."""
    # Figure, not pyplot, needs no display and keeps no global state.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    header = trace.header
    shares = trace.uses() / max(header.tokens, 1)
    layers, experts = shares.shape
    width = min(max(5.0, 0.25 * experts + 2), 16.0)
    height = min(max(2.5, 0.25 * layers + 1.5), 12.0)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    even = header.architecture.num_experts_per_tok / experts
    axes.set(
        xlabel="expert",
        ylabel="layer",
    )
    # Two lines: a small model's figure is narrow.
    axes.set_title(
        f"{header.model}: {header.tokens} tokens\n(evenly used experts: {even:.3g})",
        fontsize="medium",
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes, label="share of tokens")
    save_plot(figure, path)
