"""The base of all campaigns: a small checkpoint, the conversions, and their undisturbed results."""

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
    """A state that the conversion does not survive; the message is one line."""


@dataclass(frozen=True)
class Case:
    """A kind of conversion. hub: True if the source is a repository, whose shards are fetched."""

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
    """A folder with the source, also served by a Hub, and the undisturbed conversion of each case.

    project: the tree whose moe-convert is tested. cases: names. A conversion is made when it is
    first requested. Use it as a context.
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
        """Open a lane, which makes one attempt at a time."""
        return self._opened.enter_context(Lane(self, self.folder / name))

    def choose(self, names: Sequence[str], state: random.Random) -> Case:
        """Choose one of this workshop's cases among `names`."""
        return state.choice([case for case in self.cases if case.name in names])

    def good(self, case: Case, lane: "Lane") -> "Good":
        """Return the undisturbed conversion; `lane` makes it if it does not exist."""
        with self._lock:
            if case.name not in self._good:
                self._good[case.name] = lane.make_good(case, self.folder / f"good-{case.name}")
            return self._good[case.name]


@dataclass(frozen=True)
class Good:
    """An undisturbed conversion: its folder, its hashes, and the calls that changed files.

    said: the model's output, once it was requested.
    """

    folder: Path
    hashes: dict[str, str]
    calls: list[Call]
    said: list[str] = field(default_factory=list)


class Lane:
    """A warm interpreter and the output folder of its commands. Use it as a context."""

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
        """Run a command. Raises Failed if it takes too long."""
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
        """Remove `out`, of any kind, and the folders that were put aside."""
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
        """Raise Failed unless `out` has exactly the files of the undisturbed conversion."""
        good, found = self.workshop.good(case, self).hashes, hashes_in(self.out)
        if differing := sorted(
            name for name in good.keys() | found.keys() if good.get(name) != found.get(name)
        ):
            raise Failed(f"done with other bytes in {', '.join(differing)}")

    def check_resume(self, case: Case, *options: object) -> None:
        """Raise Failed unless the same command continues to the same bytes."""
        self.workshop.good(case, self)
        ended = self.convert(case, *options)
        if ended.code:
            raise Failed(f"resume exits with {ended.code}: {last_lines(ended.output)}")
        self.check_result(case)

    def warm_up(self) -> None:
        """Import the modules that commands import."""
        for case in self.workshop.cases:
            self.commands.run(*self._command(case, 1, self.out), warm=True, seconds=600)
            self.clear()
        folder = self.workshop.good(case, self).folder
        self.commands.run("generate", folder, *PROMPT, warm=True, seconds=600)

    def make_good(self, case: Case, folder: Path) -> Good:
        """Convert into `folder` undisturbed; later commands then find its imports loaded."""
        folder.mkdir()
        out, log = folder / RESULT[1:], self.folder / "calls"
        ended = self.commands.run(
            *self._command(case, 1, out), log=log, logged=RESULT, warm=True, seconds=600
        )  # fmt: skip
        if ended.code:
            raise RuntimeError(f"the undisturbed conversion {case.name} fails: {ended.output}")
        return Good(out, hashes_in(out), read_calls(log))

    def said(self, case: Case) -> str:
        """Return the text that the undisturbed conversion generates."""
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
    """True if a command ended with an error of ours.

    Raises Failed if it ended with another error or was killed.
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
