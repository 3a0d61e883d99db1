"""KL against bits per expert weight, from what bench/quality.py --json wrote: a panel a file, a line a solver.

pip install 'moe-convert[plots]'
python bench/quality.py --recipe 2bit --recipe 3bit --recipe 4bit --json plain.json
python bench/quality.py --outliers --recipe 2bit --recipe 3bit --recipe 4bit --json outliers.json
python bench/plot_quality.py plain.json outliers.json -o docs/quality.svg
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from make_checkpoint import SHAPES

from converter.recipes import make_recipe
from formats.packing import packing_named

MARKERS = "osD^vPX"


def expert_bits(recipe: str) -> float:
    """Bits per expert weight at the sizes of 8x7B: a small model's columns do not fill the blocks."""
    chosen, shape = make_recipe(recipe), SHAPES["8x7b"]
    rows, columns = shape.intermediate, shape.hidden
    gate_up = packing_named(chosen.gate_up).matrix_bytes(rows, columns)
    down = packing_named(chosen.down).matrix_bytes(columns, rows)
    return 8 * (2 * gate_up + down) / (3 * rows * columns)


def plot_quality(records: list[dict[str, Any]], out: Path) -> None:
    """Writes the figure as SVG, the same bytes for the same records. Bars are two standard errors each way."""
    import matplotlib

    matplotlib.use("svg")
    # Text stays text: small, searchable. A fixed salt, no date: nothing changes but what the numbers do.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "moe-convert", "font.size": 9})
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(records), figsize=(1 + 3.7 * len(records), 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    bits = {step["recipe"]: expert_bits(step["recipe"]) for record in records for step in record["steps"]}
    order = list(dict.fromkeys(step["solver"] for record in records for step in record["steps"]))
    for panel, record in zip(panels[0], records, strict=True):
        for number, solver in enumerate(order):
            steps = sorted((s for s in record["steps"] if s["solver"] == solver), key=lambda s: bits[s["recipe"]])
            panel.errorbar(
                [bits[s["recipe"]] for s in steps],
                [s["kl"] for s in steps],
                yerr=[2 * s["kl_error"] for s in steps],
                label=solver.replace(":", ", "),
                marker=MARKERS[number % len(MARKERS)],
                markersize=4,
                linewidth=1,
                capsize=2,
            )
        panel.set_xticks(list(bits.values()), [f"{value:.2f}\n{name}" for name, value in bits.items()])
        panel.set_yscale("log")
        panel.set_title(record["model"])
        panel.set_xlabel("bits per expert weight (8x7B)")
        panel.grid(True, which="major", linewidth=0.3)
    panels[0][0].set_ylabel("mean KL to the original, nats a token")
    panels[0][0].legend(frameon=False)
    figure.savefig(out, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", metavar="JSON")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="SVG")
    options = parser.parse_args()
    records = [json.loads(path.read_text()) for path in options.results]
    if wrong := [str(p) for p, r in zip(options.results, records, strict=True) if r.get("bench") != "quality"]:
        parser.error(f"{', '.join(wrong)}: not written by bench/quality.py --json")
    plot_quality(records, options.out)


if __name__ == "__main__":
    sys.exit(main())
