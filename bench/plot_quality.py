"""Plot KL against bits per expert weight, from the JSON of bench/quality.py.

Each model has a panel, each solver a line; mixed bits have their own lines.

pip install 'moe-convert[plots]'
python bench/quality.py --recipe 2bit --recipe 3bit --recipe 4bit --json plain.json
python bench/quality.py --outliers --recipe 2bit --recipe 3bit --recipe 4bit --json outliers.json
python bench/plot_quality.py plain.json outliers.json -o docs/quality-kl.svg

Several files of one model share its panel.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

MARKERS = "osD^vPX"


def plot_quality(records: list[dict[str, Any]], out: Path) -> None:
    """Write the figure as SVG: the same bytes for the same records.

    Error bars are two standard errors each way.
    """
    import matplotlib

    matplotlib.use("svg")
    # Text stays text: small, searchable. A fixed salt, no date: nothing changes but what the
    # numbers do.
    matplotlib.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "moe-convert", "font.size": 9}
    )
    from matplotlib import pyplot

    models: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        models.setdefault(record["model"], []).extend(record["steps"])
    figure, panels = pyplot.subplots(
        1,
        len(models),
        figsize=(1 + 3.7 * len(models), 3.8),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    every = [step for steps in models.values() for step in steps]
    uniform = {
        step["recipe"]: step["bits"]
        for step in every
        if _line(step) == step["solver"].replace(":", ", ")
    }
    order = list(dict.fromkeys(map(_line, every)))
    for panel, (model, found) in zip(panels[0], models.items(), strict=True):
        for number, line in enumerate(order):
            steps = sorted((s for s in found if _line(s) == line), key=lambda s: s["bits"])
            panel.errorbar(
                [s["bits"] for s in steps],
                [s["kl"] for s in steps],
                yerr=[2 * s["kl_error"] for s in steps],
                label=line,
                marker=MARKERS[number % len(MARKERS)],
                markersize=4,
                linewidth=1,
                capsize=2,
            )
        panel.set_xticks(
            list(uniform.values()), [f"{value:.2f}\n{name}" for name, value in uniform.items()]
        )
        panel.set_yscale("log")
        panel.set_title(model)
        panel.set_xlabel("bits per expert weight (8x7B)")
        panel.grid(True, which="major", linewidth=0.3)
    panels[0][0].set_ylabel("mean KL to the original, nats a token")
    panels[0][0].legend(frameon=False)
    figure.savefig(out, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def _line(step: dict[str, Any]) -> str:
    """The line that a step belongs to."""
    recipe, solver = step["recipe"], step["solver"].replace(":", ", ")
    if recipe.endswith("bpw"):
        return f"{solver}: mixed by target"
    return f"{solver}: down has more bits" if "down" in recipe else solver


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", metavar="JSON")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="SVG")
    options = parser.parse_args()
    records = [json.loads(path.read_text()) for path in options.results]
    if wrong := [
        str(p) for p, r in zip(options.results, records, strict=True) if r.get("bench") != "quality"
    ]:
        parser.error(f"{', '.join(wrong)}: not written by bench/quality.py --json")
    plot_quality(records, options.out)


if __name__ == "__main__":
    sys.exit(main())
