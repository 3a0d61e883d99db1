"""moe-convert with system calls that fail or kill it: compile shim.c, and run commands with it in
one warm interpreter.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


@dataclass(frozen=True)
class Fault:
    """A failing call: the `first` one (from 1) of `function` on a file whose path contains `path`.

    count: number of failing calls from it on; 0: all later ones too. function: a name of shim.c.
    """

    function: str
    path: str
    error: int
    first: int = 1
    count: int = 1

    @property
    def rule(self) -> str:
        """The line for shim.c."""
        return f"{self.function} {self.path} {self.first} {self.count} {self.error}"

    def __str__(self) -> str:
        name = errno.errorcode.get(self.error, str(self.error))
        return f"{self.function}-{self.path}-{self.first}-{name}"


@dataclass(frozen=True)
class Kill:
    """A kill at the `call`-th call (from 1) that changes a file whose path contains `path`.

    It happens before or after the call, or in its middle: then half of a write's bytes are written.
    """

    when: Literal["before", "after", "torn"]
    path: str
    call: int

    @property
    def rule(self) -> str:
        """The line for shim.c."""
        return f"* {self.path} {self.call} 1 {self.when}"


@dataclass(frozen=True)
class Ended:
    """The end of a command.

    code: exit code, or minus the signal that killed it. output: stdout and stderr. hits: number of
    calls that failed. too_slow: True if it exceeded its time limit.
    """

    code: int
    output: str
    hits: int
    too_slow: bool


class FaultyCommands:
    """Runs moe-convert with the shim. Use it as a context.

    folder: for the library and outputs. project: the tree whose moe-convert runs.
    """

    def __init__(
        self, folder: Path, project: Path = ROOT, environ: Mapping[str, str] | None = None
    ) -> None:
        self._output, self._modules = folder / "output", folder / "modules"
        library = folder / "shim.so"
        subprocess.run(
            [compiler(), "-O1", "-shared", "-fPIC", "-o", library, HERE / "shim.c", "-ldl"],
            check=True,
        )
        forced = {"PYTHONPATH": str(project), "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, HERE / "command_server.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | (environ or {}) | forced,
            cwd=folder,
        )

    def run(
        self,
        *arguments: object,
        faults: Sequence[Fault | Kill] = (),
        log: Path | None = None,
        logged: str = "",
        kill_after_s: float | None = None,
        seconds: float = 60,
        warm: bool = False,
    ) -> Ended:
        """Run one command to its end.

        log: file for the calls that change files whose path contains `logged`. kill_after_s: time
        from the command's start. warm: True if later commands find its imports loaded.
        """
        assert self._server.stdin and self._server.stdout
        task = {
            "arguments": [str(a) for a in arguments],
            "rules": "\n".join(fault.rule for fault in faults),
            "output": str(self._output),
            "log": str(log or ""),
            "logged": logged,
            "kill_after_s": kill_after_s,
            "seconds": seconds,
            "modules": str(self._modules) if warm else "",
        }
        self._server.stdin.write(json.dumps(task) + "\n")
        self._server.stdin.flush()
        code, hits, too_slow = json.loads(self._server.stdout.readline())
        return Ended(code, self._output.read_text(errors="replace"), hits, too_slow)

    def __enter__(self) -> "FaultyCommands":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin and self._server.stdout
        self._server.stdin.close()
        # Nothing is lost, and an interpreter with so many modules ends slowly.
        self._server.kill()
        self._server.wait()
        self._server.stdout.close()


def compiler() -> str:
    """Return the C compiler; empty if there is none, or no LD_PRELOAD."""
    return (shutil.which("cc") or "") if sys.platform == "linux" else ""
