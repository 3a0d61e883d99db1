"""Draw decoding speed under memory limits as an SVG, from the JSON of bench/offload.py.

python bench/offload.py FOLDER --rounds 3 --tokens 32 --json > offload.json
python bench/plot_offload.py offload.json -o offload.svg
python bench/plot_offload.py bench/results/offload.json -o docs/offload-speed.svg

The last line draws the chart of the README. The file in bench/results has one run for each bar: the
median that docs/benchmarks.md states. A list `setting` in the JSON becomes the lines below the
chart.
"""

import argparse
import json
import statistics
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

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
    Series("kernel's map", "plain mmap, same kernels", "#8c959f"),
)


def offload_svg(result: dict[str, Any]) -> str:
    """Return the chart: a group for each share of the experts' bytes, a bar for each series.

    A bar is the median of its runs. The background is opaque, so that the chart is readable on
    light and on dark pages.
    """
    groups = {
        share: [statistics.median(run["tokens_per_s"] for run in modes[s.mode]) for s in SERIES]
        for share, modes in result["runs"].items()
    }
    longest = max(max(speeds) for speeds in groups.values())
    parts = [_text(24, 34, TITLE, size=17, weight=600)]
    parts += _legend()
    y = TOP
    for share, speeds in groups.items():
        parts.append(_text(LEFT - 12, y + BAR + 4, f"{float(share):.0%} in RAM", anchor="end"))
        for series, speed in zip(SERIES, speeds, strict=True):
            length = (RIGHT - LEFT) * speed / longest
            parts.append(_rectangle(LEFT, y, length, BAR - 2, series.colour))
            parts.append(_text(LEFT + length + 6, y + 15, f"{speed:.1f}"))
            y += BAR
        y += GROUP_GAP
    for line in result.get("setting", []):
        y += LINE
        parts.append(_text(24, y - 10, line, size=12, colour=FAINT))
    return _frame(parts, height=y + 14)


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
