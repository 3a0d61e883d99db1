"""Folders made by an attacker: links, pipes and folders in the place of our files."""

import os
import random
from pathlib import Path

from faults.campaigns.flips import JOURNAL, READ_BY_PEOPLE
from faults.campaigns.workshop import INDEX, RESULT, Failed, Lane, hashes_in, is_refused
from faults.shim import Kill

OBJECTS = (
    "link to file",
    "link to folder",
    "broken link",
    "pipe",
    "folder",
    "full folder",
    "hard link",
    "empty file",
)
OWN = (
    "",
    "experts",
    ".moe-convert.lock",
    JOURNAL,
    ".moe-convert.calibration",
    ".moe-convert.calibration/state",
    ".moe-convert.calibration/state.partial",
    ".moe-convert.source",
)


class HostileFolders:
    """Replace one of our names in a new, an unfinished or a complete folder.

    The command ends with an error of ours or with the same bytes, and does not touch the targets of
    links.
    """

    def states(self, lane: Lane) -> None:
        """Endless."""
        return None

    def attempt(self, state: random.Random, lane: Lane) -> str:
        """Tries one state."""
        case = state.choice(lane.workshop.cases)
        good = lane.workshop.good(case, lane)
        lane.clear()
        before = state.choice(("new", "unfinished", "complete"))
        if before == "unfinished":
            lane.convert(case, faults=[Kill("before", RESULT, state.randint(2, len(good.calls)))])
        elif before == "complete":
            lane.copy(good.folder)
        files = [
            *good.hashes,
            *(f"{name}{end}" for name in good.hashes for end in (".partial", ".zstd.partial")),
        ]
        name = state.choice([*OWN, *files])
        complete = (lane.out / INDEX).exists()
        victims = make_victims(lane.folder / "victims")
        put(lane.out / name, state.choice(OBJECTS), lane.folder / "victims")
        options = state.choice(((), ("--force",), ("--no-resume",)))
        ended = lane.convert(case, *options)
        if hashes_in(lane.folder / "victims") != victims:
            raise Failed(f"a file outside was changed through {name or 'the out folder'}")
        if is_refused(ended):
            return "refused"
        found = hashes_in(lane.out)
        differing = {file for file in good.hashes if found.get(file) != good.hashes[file]}
        if complete and "--force" not in options:
            # Nothing was written. What became of a complete folder is found by verify.
            differing -= READ_BY_PEOPLE
            if differing and is_refused(lane.run("verify", lane.out, "--read-data", "-q")):
                return "found by verify"
        if differing:
            raise Failed(f"done with other bytes in {', '.join(sorted(differing))}")
        return "same bytes"


def make_victims(folder: Path) -> dict[str, str]:
    """Make files that nobody may touch. Return their hashes."""
    if not folder.exists():
        (folder / "experts").mkdir(parents=True)
    for name in ("file", "experts/layer-000.safetensors", "experts/other"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_text("somebody's\n")
    return hashes_in(folder)


def put(path: Path, kind: str, victims: Path) -> None:
    """Puts something in the place of `path`."""
    if path.is_dir() and not path.is_symlink():
        path.rename(path.with_name(f"{path.name}-before"))
    path.unlink(missing_ok=True)
    for parent in reversed(path.parents):
        if not parent.exists():
            parent.mkdir()
    if kind == "link to file":
        path.symlink_to(victims / "file")
    elif kind == "link to folder":
        path.symlink_to(victims)
    elif kind == "broken link":
        path.symlink_to(victims / "nothing")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "hard link":
        path.hardlink_to(victims / "file")
    elif kind == "empty file":
        path.touch()
    else:
        path.mkdir()
        if kind == "full folder":
            (path / "notes").write_text("somebody's\n")
