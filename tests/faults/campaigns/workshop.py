"""What the campaigns share: a small checkpoint, the conversions that are tried, and what each gives
undisturbed.
"""

import hashlib
import random
import shutil
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from faults.campaigns.call_log import Call, read_calls
from faults.shim import ROOT, Ended, Fault, FaultyCommands, Kill
from hub_server import HubServer
from make_checkpoint import SHAPES, make_checkpoint

RESULT = "/result"
"""In the path of everything that a conversion writes."""
INDEX = "moe_index.json"
PROMPT = ("--prompt", "Once upon a time", "--max-new-tokens", 8, "-q")


class Failed(Exception):
    """What must not be: the message says it in one line."""


@dataclass(frozen=True)
class Case:
    """One kind of conversion. hub: of a repository, whose shards are fetched meanwhile."""

    name: str
    options: tuple[str, ...]
    hub: bool = False


CASES = {
    case.name: case
    for case in (
        Case("plain", ("--solver", "refit", "--calibrate", "none")),
        Case("zstd", ("--solver", "hqq", "--calibrate", "none", "--codec", "zstd")),
        Case("calibrated", ("--calibration-tokens", "1024")),
        Case("target", ("--calibration-tokens", "1024", "--target-bpw", "9.5")),
        Case("hub", ("--solver", "hqq", "--calibrate", "none"), hub=True),
    )
}
"""--target-bpw: about the middle of what so small matrices can have."""


class Workshop:
    """A folder with the source, served by a Hub too, and for each case the undisturbed conversion,
    made when it is first asked for. `project`: the tree whose moe-convert is tried. `cases`: names.
    A context.
    """

    def __init__(
        self, folder: Path, project: Path = ROOT, cases: Sequence[str] = tuple(CASES)
    ) -> None:
        self.folder, self.project = folder, project
        self.cases = [CASES[name] for name in cases]
        self.source = folder / "checkpoint"
        make_checkpoint(self.source, SHAPES["mini"], 2, shards=2)
        self._opened = ExitStack()
        self.hub = self._opened.enter_context(HubServer())
        self.hub.add("me/checkpoint", self.source)
        self._lock = threading.RLock()
        self._good: dict[str, Good] = {}

    def __enter__(self) -> "Workshop":
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def lane(self, name: str) -> "Lane":
        """A place where one attempt at a time is made."""
        return self._opened.enter_context(Lane(self, self.folder / name))

    def choose(self, names: Sequence[str], state: random.Random) -> Case:
        """One of the cases of these names that are tried here."""
        return state.choice([case for case in self.cases if case.name in names])

    def good(self, case: Case, lane: "Lane") -> "Good":
        """The undisturbed conversion; `lane` makes it where need be."""
        with self._lock:
            if case.name not in self._good:
                self._good[case.name] = lane.make_good(case, self.folder / f"good-{case.name}")
            return self._good[case.name]


@dataclass(frozen=True)
class Good:
    """An undisturbed conversion: its folder, its hashes, the calls that changed files, and, once it
    was asked for, what the model says.
    """

    folder: Path
    hashes: dict[str, str]
    calls: list[Call]
    said: list[str] = field(default_factory=list)


class Lane:
    """One warm interpreter and the out folder of its commands. A context."""

    def __init__(self, workshop: Workshop, folder: Path) -> None:
        self.workshop = workshop
        self.folder, self.out = folder, folder / RESULT[1:]
        folder.mkdir()
        self.commands = FaultyCommands(
            folder, workshop.project, workshop.hub.environ(folder / "hub-home")
        )

    def __enter__(self) -> "Lane":
        return self

    def __exit__(self, *error: object) -> None:
        self.commands.__exit__(*error)

    def run(
        self, *arguments: object, faults: Sequence[Fault | Kill] = (), warm: bool = False
    ) -> Ended:
        """One command. Failed if it takes too long."""
        ended = self.commands.run(*arguments, faults=faults, warm=warm)
        if ended.too_slow:
            raise Failed(f"{arguments[0]} does not end")
        return ended

    def convert(
        self, case: Case, *options: object, faults: Sequence[Fault | Kill] = (), workers: int = 1
    ) -> Ended:
        """Converts to `out`. One worker makes the same calls in the same order each time."""
        return self.run(*self._command(case, workers, self.out), *options, faults=faults)

    def convert_and_kill(self, case: Case, seconds: float, workers: int) -> Ended:
        """Converts to `out` and kills the process after a time."""
        return self.commands.run(*self._command(case, workers, self.out), kill_after_s=seconds)

    def clear(self) -> None:
        """Removes `out`, whatever it is, and what was put aside."""
        for path in (self.out, self.out.with_name(f"{self.out.name}-before")):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def copy(self, folder: Path) -> None:
        """Makes `out` a copy of a folder."""
        self.clear()
        shutil.copytree(folder, self.out)

    def check_result(self, case: Case) -> None:
        """Failed unless `out` has the bytes of the undisturbed conversion, and nothing else."""
        good, found = self.workshop.good(case, self).hashes, hashes_in(self.out)
        if differing := sorted(
            name for name in good.keys() | found.keys() if good.get(name) != found.get(name)
        ):
            raise Failed(f"done with other bytes in {', '.join(differing)}")

    def check_resume(self, case: Case, *options: object) -> None:
        """Failed unless the same command goes on to the same bytes."""
        self.workshop.good(case, self)
        ended = self.convert(case, *options)
        if ended.code:
            raise Failed(f"resume exits with {ended.code}: {last_lines(ended.output)}")
        self.check_result(case)

    def warm_up(self) -> None:
        """Imports what commands import."""
        for case in self.workshop.cases:
            self.commands.run(*self._command(case, 1, self.out), warm=True, seconds=600)
            self.clear()
        folder = self.workshop.good(case, self).folder
        self.commands.run("generate", folder, *PROMPT, warm=True, seconds=600)

    def make_good(self, case: Case, folder: Path) -> Good:
        """Converts into `folder` undisturbed. What that imports, later commands find imported."""
        folder.mkdir()
        out, log = folder / RESULT[1:], self.folder / "calls"
        ended = self.commands.run(
            *self._command(case, 1, out), log=log, logged=RESULT, warm=True, seconds=600
        )  # fmt: skip
        if ended.code:
            raise RuntimeError(f"the undisturbed conversion {case.name} fails: {ended.output}")
        return Good(out, hashes_in(out), read_calls(log))

    def said(self, case: Case) -> str:
        """What the undisturbed conversion generates."""
        good = self.workshop.good(case, self)
        if not good.said:
            good.said.append(
                self.commands.run("generate", good.folder, *PROMPT, warm=True, seconds=600).output
            )
        return good.said[0]

    def _command(self, case: Case, workers: int, out: Path) -> list[object]:
        source = "me/checkpoint" if case.hub else self.workshop.source
        return ["convert", source, "-o", out, "-q", "--max-workers", workers, *case.options]


def hashes_in(out: Path) -> dict[str, str]:
    """sha256 of every file in a folder, by name."""
    files = (file for file in sorted(out.rglob("*")) if file.is_file())
    return {
        str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }


def is_refused(ended: Ended) -> bool:
    """True if a command ended with an error of ours. Failed if it ended with another one, or was
    killed.
    """
    if ended.code == 0:
        return False
    ours = ended.code in (1, 2, 3, 4) and ("error: " in ended.output or ended.code == 3)
    if not ours or "Traceback" in ended.output or "error: unexpected" in ended.output:
        raise Failed(f"exit code {ended.code}: {last_lines(ended.output)}")
    return True


def last_lines(output: str) -> str:
    """The end of an output, in one line."""
    return " | ".join(output.strip().splitlines()[-3:])[-400:]
