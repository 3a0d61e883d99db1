"""Damaged bytes: in the files of an unfinished conversion, and in a complete folder."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.campaigns.damage import damaged
from faults.campaigns.workshop import (
    INDEX,
    PROMPT,
    RESULT,
    Case,
    Failed,
    Lane,
    hashes_in,
    is_refused,
    last_lines,
)
from faults.shim import Kill

JOURNAL = ".moe-convert.journal"
KINDS = ("bit", "bit", "digit", "zeros", "other block", "cut", "longer")
MOMENTS = (0.2, 0.4, 0.6, 0.8, 1)
READ_BY_PEOPLE = {"README.md", "quality.json"}
"""They have no checksum: no weight and no token depends on them."""
ORIGIN = {"producer", "source", "recipe"}
"""Fields of the index of which the same is true."""
USERS_OWN = {"config.json", "generation_config.json"}
"""Users may change some fields of these, and are told so."""


class UnfinishedFlips:
    """Damage to one file of an unfinished conversion.

    The same command gives the same bytes. If `refusable`, it may fail with an error of ours, and
    --no-resume then gives the same bytes. `chosen` selects the files.
    """

    def __init__(
        self,
        cases: tuple[str, ...],
        chosen: Callable[[Path], bool],
        kinds: tuple[str, ...] = KINDS,
        *,
        refusable: bool = True,
    ) -> None:
        self._cases, self._chosen, self._kinds, self._refusable = cases, chosen, kinds, refusable

    def states(self, lane: Lane) -> None:
        """Endless."""
        return None

    def attempt(self, state: random.Random, lane: Lane) -> str:
        """Tries one state."""
        case = lane.workshop.choose(self._cases, state)
        files: list[Path] = []
        for moment in state.sample(MOMENTS, len(MOMENTS)):
            lane.copy(self._begun(case, moment, lane))
            files = [p for p in sorted(lane.out.rglob("*")) if p.is_file() and self._chosen(p)]
            if files:
                break
        path, kind = state.choice(files), state.choice(self._kinds)
        path.write_bytes(damaged(path.read_bytes(), kind, state))
        ended = lane.convert(case)
        if not is_refused(ended):
            lane.check_result(case)
            return "same bytes"
        if not self._refusable:
            raise Failed(f"refused: {last_lines(ended.output)}")
        lane.check_resume(case, "--no-resume")
        return "refused"

    def _begun(self, case: Case, moment: float, lane: Lane) -> Path:
        """Return a conversion killed at a moment: 0 its beginning, 1 before its index."""
        calls = lane.workshop.good(case, lane).calls
        index = next(n for n, call in enumerate(calls, 1) if call.path.endswith(f"{INDEX}.partial"))
        begun = lane.folder / f"begun-{case.name}-{moment}"
        if not begun.exists():
            lane.clear()
            lane.convert(case, faults=[Kill("before", RESULT, round(index * moment))])
            shutil.copytree(lane.out, begun)
        return begun


class CompleteFlips:
    """Damage to one file of a complete folder.

    verify reports it, except in the index's fields about the origin.
    """

    def states(self, lane: Lane) -> None:
        """Endless."""
        return None

    def attempt(self, state: random.Random, lane: Lane) -> str:
        """Tries one state."""
        case = lane.workshop.choose(("plain", "zstd"), state)
        name = damage_one(case, state, lane)
        report = lane.run("verify", lane.out, "--read-data")
        if is_refused(report):
            return "found"
        if is_said(name, report.output):
            return "a change that a user may make is said"
        good = lane.workshop.good(case, lane).folder
        if name == INDEX and _without_origin(lane.out / INDEX) == _without_origin(good / INDEX):
            return "the index tells of another origin"
        raise Failed(f"verify is content with a damaged {name}")


def without_warnings(output: str) -> str:
    """A command's output without lines that warn."""
    return "".join(
        line for line in output.splitlines(keepends=True) if not line.startswith("WARNING: ")
    )


def is_said(name: str, output: str) -> bool:
    """True if users may change the damaged file, and a note or warning reports the change."""
    return name in USERS_OWN and any(
        name in line for line in output.splitlines() if not line.startswith("ok")
    )


def _without_origin(index: Path) -> dict[str, Any]:
    return {
        field: value
        for field, value in json.loads(index.read_bytes()).items()
        if field not in ORIGIN
    }


class TokenFlips:
    """Damage in a complete folder, then generate: the same tokens, or an error of ours."""

    def states(self, lane: Lane) -> None:
        """Endless."""
        return None

    def attempt(self, state: random.Random, lane: Lane) -> str:
        """Tries one state."""
        case = lane.workshop.choose(("plain", "zstd"), state)
        text = lane.said(case)
        name = (
            damage_one(case, state, lane)
            if state.random() < 0.5
            else damage_layer(case, state, lane)
        )
        cache = state.choice(
            (("--ram-cache", "100KB"), ("--ram-cache", "100KB", "--io", "direct"), ())
        )
        ended = lane.run("generate", lane.out, *PROMPT, *cache)
        if is_refused(ended):
            return "refused"
        if without_warnings(ended.output) == text:
            return "same tokens"
        if is_said(name, ended.output):
            return "a change that a user may make is said"
        raise Failed(f"other tokens: {ended.output!r}")


def damage_one(case: Case, state: random.Random, lane: Lane) -> str:
    """Make `out` a complete conversion with one damaged file; return its name.

    All files are equally likely whatever their size, except those that only people read.
    """
    lane.copy(lane.workshop.good(case, lane).folder)
    names = sorted(hashes_in(lane.out).keys() - READ_BY_PEOPLE)
    name = state.choice([*names, INDEX])
    path = lane.out / name
    path.write_bytes(damaged(path.read_bytes(), state.choice(KINDS), state))
    return name


def damage_layer(case: Case, state: random.Random, lane: Lane) -> str:
    """Make `out` a complete conversion with 64 flipped bits in each 4 KiB of a layer's experts.

    Return the name of the layer's file.
    """
    lane.copy(lane.workshop.good(case, lane).folder)
    path = state.choice(sorted((lane.out / "experts").iterdir()))
    data = bytearray(path.read_bytes())
    for begin in range(4096, len(data), 4096):
        for _ in range(64):
            data[state.randrange(begin, min(begin + 4096, len(data)))] ^= 1 << state.randrange(8)
    path.write_bytes(data)
    return path.name
