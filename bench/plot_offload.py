"""Draw decoding speed under memory limits as an SVG, from the JSON of bench/offload.py.

python bench/offload.py FOLDER --rounds 3 --tokens 32 --json > bench/results/offload.json
python bench/plot_offload.py bench/results/offload.json -o docs/offload-speed.svg

draws the chart of the README. A bar is the median of its runs, which docs/benchmarks.md states. The
list `setting` in the JSON becomes the lines below the chart.
"""

import argparse
import json
import statistics
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from offload_table import IN_RAM, MAPPED

TITLE = "Tokens per second when memory holds a part of the experts"
WIDTH = 760
LEFT = 170
"""Begin of the bars."""
RIGHT = 700
"""End of the longest bar; its number stands behind it."""
TOP = 88
BAR = 22
GROUP_GAP = 18
LINE = 18
INK = "#1f2328"
FAINT = "#59636e"


@dataclass(frozen=True)
class Series:
    """A mode of bench/offload.py, as the chart names and colours it."""

    mode: str
    name: str
    colour: str


SERIES = (
    Series("engine", "moe-convert", "#0969da"),
    Series(MAPPED, "plain mmap, same kernels", "#8c959f"),
)


def offload_svg(result: dict[str, Any]) -> str:
    """Return the chart: a group for each memory limit, a bar for each series that it has.

    A bar is the median of its runs. The background is opaque, so that the chart is readable on
    light and on dark pages.
    """
    groups = {
        limit: [(s, median(modes[s.mode], "tokens_per_s")) for s in SERIES if s.mode in modes]
        for limit, modes in result["runs"].items()
    }
    longest = max(speed for bars in groups.values() for _, speed in bars)
    parts = [_text(24, 34, TITLE, size=17, weight=600)]
    parts += _legend()
    y = TOP
    for limit, bars in groups.items():
        middle = y + BAR * len(bars) / 2
        parts.append(_text(LEFT - 12, middle + 4, label_of(limit), anchor="end"))
        for series, speed in bars:
            length = (RIGHT - LEFT) * speed / longest
            parts.append(_rectangle(LEFT, y, length, BAR - 2, series.colour))
            parts.append(_text(LEFT + length + 6, y + 15, speed_text(speed)))
            y += BAR
        y += GROUP_GAP
    for line in result.get("setting", []):
        y += LINE
        parts.append(_text(24, y - 10, line, size=12, colour=FAINT))
    return _frame(parts, height=y + 14)


def median(runs: list[dict[str, float]], name: str) -> float:
    """Return the median of a figure of several runs."""
    return statistics.median(run[name] for run in runs)


def speed_text(tokens_per_s: float) -> str:
    """Return a speed with one digit after the point, below 2 with two."""
    return f"{tokens_per_s:.{1 if tokens_per_s >= 2 else 2}f}"


def label_of(limit: str) -> str:
    """Return a group's name for a key of the runs: a share, a size, or IN_RAM."""
    if limit == IN_RAM:
        return "all experts in RAM"
    return f"{limit} of RAM" if limit.endswith("GiB") else f"{float(limit):.0%} in RAM"


def _frame(parts: list[str], height: int) -> str:
    background = (
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"'
        ' fill="#ffffff" stroke="#d1d9e0"/>'
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {WIDTH} {height}"'
        f' width="{WIDTH}" height="{height}" font-family="system-ui, sans-serif">'
    )
    return "\n".join([head, f"<title>{TITLE}</title>", background, *parts, "</svg>", ""])


def _legend() -> list[str]:
    parts = []
    x = LEFT
    for series in SERIES:
        parts.append(_rectangle(x, 54, 14, 14, series.colour))
        parts.append(_text(x + 20, 66, series.name))
        x += 150
    return parts


def _rectangle(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:.1f}" height="{height:g}" fill="{colour}"/>'


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 13,
    colour: str = INK,
    weight: int = 400,
    anchor: str = "start",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:g}" font-size="{size}" font-weight="{weight}" fill="{colour}"'
        f' text-anchor="{anchor}">{escape(text, quote=False)}</text>'
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path, help="JSON of bench/offload.py")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="SVG")
    options = parser.parse_args()
    options.out.write_text(offload_svg(json.loads(options.result.read_text())))


if __name__ == "__main__":
    main()
