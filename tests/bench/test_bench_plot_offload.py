"""bench/plot_offload.py and the chart of the README."""

import copy
import json
import re
from xml.etree import ElementTree

from plot_offload import SERIES, median, offload_svg, speed_text
from project_paths import ROOT

RESULT = json.loads((ROOT / "bench" / "results" / "offload.json").read_text())
SVG = "{http://www.w3.org/2000/svg}"


def bar_lengths(svg: str) -> list[float]:
    """Lengths of the bars, from the first group on."""
    rectangles = ElementTree.fromstring(svg).findall(f"{SVG}rect")
    colours = {series.colour for series in SERIES}
    bars = [r for r in rectangles if r.get("fill") in colours]
    # The legend's squares come first.
    return [float(bar.attrib["width"]) for bar in bars[len(SERIES) :]]


def test_the_chart_of_the_readme_is_drawn_from_the_stored_result() -> None:
    chart = (ROOT / "docs" / "offload-speed.svg").read_text()
    assert chart == offload_svg(RESULT), (
        "run python bench/plot_offload.py bench/results/offload.json -o docs/offload-speed.svg"
    )


def test_the_stored_result_has_the_numbers_of_the_page() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    for modes in RESULT["runs"].values():
        for runs in modes.values():
            megabytes = median(runs, "bytes_per_token") / 1e6
            assert f"| {speed_text(median(runs, 'tokens_per_s'))} | {megabytes:.1f} |" in page


def test_a_bar_is_as_long_as_its_speed() -> None:
    lengths = bar_lengths(offload_svg(RESULT))
    speeds = [
        median(modes[series.mode], "tokens_per_s")
        for modes in RESULT["runs"].values()
        for series in SERIES
        if series.mode in modes
    ]
    scale = lengths[0] / speeds[0]
    assert lengths == [round(speed * scale, 1) for speed in speeds]


def test_a_bar_is_the_median_of_its_rounds() -> None:
    result = copy.deepcopy(RESULT)
    result["runs"] = {
        "0.5": {
            "engine": [{"tokens_per_s": speed} for speed in (1.0, 30.0, 8.0)],
            "kernel's map": [{"tokens_per_s": 2.0}],
        }
    }
    numbers = re.findall(r">(\d+\.\d)</text>", offload_svg(result))
    assert numbers == ["8.0", "2.0"]


def test_groups_are_named_by_their_limit_and_may_lack_a_series() -> None:
    result = {
        "runs": {
            "all": {"engine": [{"tokens_per_s": 6.94}]},
            "8 GiB": {
                "engine": [{"tokens_per_s": 1.034}],
                "kernel's map": [{"tokens_per_s": 0.412}],
            },
        }
    }
    svg = offload_svg(result)
    for text in ("all experts in RAM", "8 GiB of RAM", "6.9", "1.03", "0.41"):
        assert f">{text}</text>" in svg
    assert bar_lengths(svg)[0] > bar_lengths(svg)[1] > bar_lengths(svg)[2]
