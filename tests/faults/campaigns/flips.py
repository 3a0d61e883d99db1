"""Damaged bytes: in what a resume goes on from, and in a complete folder."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from faults.campaigns.damage import damaged
from faults.campaigns.workshop import INDEX, PROMPT, RESULT, Case, Failed, Lane, hashes_in, is_refused
from faults.shim import Kill

JOURNAL = ".moe-convert.journal"
KINDS = ("bit", "bit", "digit", "zeros", "other block", "cut", "longer")
RUN_TIME = "num_experts_per_tok is"
"""In the warning of the one number that a user may change in config.json."""


class UnfinishedFlips:
    """One damaged file of an unfinished conversion. The same command gives the same bytes, or an error of ours after
    which --no-resume does. `chosen` says which files."""

    def __init__(self, cases: tuple[str, ...], chosen: Callable[[Path], bool], kinds: tuple[str, ...] = KINDS) -> None:
        self._cases, self._chosen, self._kinds = cases, chosen, kinds

    def states(self, lane: Lane) -> None:
        """Endless."""
        return None

    def attempt(self, state: random.Random, lane: Lane) -> str:
        """Tries one state."""
        case = lane.workshop.choose(self._cases, state)
        calls = lane.workshop.good(case, lane).calls
        index = next(n for n, call in enumerate(calls, 1) if call.path.endswith(f"{INDEX}.partial"))
        at = round(index * state.choice((0.4, 0.6, 0.8, 1)))
        begun = lane.folder / f"begun-{case.name}-{at}"
        if not begun.exists():
            lane.clear()
            lane.convert(case, faults=[Kill("before", RESULT, at)])
            shutil.copytree(lane.out, begun)
        lane.copy(begun)
        files = [p for p in sorted(lane.out.rglob("*")) if p.is_file() and self._chosen(p)]
        if not files:
            return "nothing to damage yet"
        path, kind = state.choice(files), state.choice(self._kinds)
        path.write_bytes(damaged(path.read_bytes(), kind, state))
        ended = lane.convert(case)
        if not is_refused(ended):
            lane.check_result(case)
            return "same bytes"
        lane.check_resume(case, "--no-resume")
        return "refused"


class CompleteFlips:
    """One damaged file of a complete folder: verify finds it, or the same command writes the bytes again."""

    def states(self, lane: Lane) -> None:
        """Endless."""
        return None

    def attempt(self, state: random.Random, lane: Lane) -> str:
        """Tries one state."""
        case = lane.workshop.choose(("plain", "zstd"), state)
        name = damage_one(case, state, lane)
        if is_refused(lane.run("verify", lane.out, "--read-data", "-q")):
            return "found"
        raise Failed(f"verify is content with a damaged {name}")


class TokenFlips:
    """Damage in a complete folder, then generate: the same tokens, or an error of ours."""

    def states(self, lane: Lane) -> None:
        """Endless."""
        return None

    def attempt(self, state: random.Random, lane: Lane) -> str:
        """Tries one state."""
        case = lane.workshop.choose(("plain", "zstd"), state)
        good = lane.workshop.good(case, lane)
        if state.random() < 0.5:
            damage_one(case, state, lane)
        else:
            damage_layer(case, state, lane)
        cache = state.choice((("--ram-cache", "100KB"), ("--ram-cache", "100KB", "--io", "direct"), ()))
        ended = lane.run("generate", lane.out, *PROMPT, *cache)
        if is_refused(ended):
            return "refused"
        if ended.output == good.text:
            return "same tokens"
        if RUN_TIME in ended.output:
            return "a changed run-time number is said"
        raise Failed(f"other tokens: {ended.output!r}")


def damage_one(case: Case, state: random.Random, lane: Lane) -> str:
    """Makes `out` a complete conversion of which one file is damaged; its name. All files are as likely, whatever
    their size, but those that only people read."""
    lane.copy(lane.workshop.good(case, lane).folder)
    names = sorted(hashes_in(lane.out).keys() - {"README.md", "quality.json"})
    name = state.choice([*names, INDEX])
    path = lane.out / name
    path.write_bytes(damaged(path.read_bytes(), state.choice(KINDS), state))
    return name


def damage_layer(case: Case, state: random.Random, lane: Lane) -> None:
    """Makes `out` a complete conversion with 64 flipped bits in each 4 KiB of a layer's experts."""
    lane.copy(lane.workshop.good(case, lane).folder)
    path = state.choice(sorted((lane.out / "experts").iterdir()))
    data = bytearray(path.read_bytes())
    for begin in range(4096, len(data), 4096):
        for _ in range(64):
            data[state.randrange(begin, min(begin + 4096, len(data)))] ^= 1 << state.randrange(8)
    path.write_bytes(data)
