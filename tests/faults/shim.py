"""moe-convert on a system whose calls fail: compiles shim.c, and runs commands under it in one warm interpreter."""

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


@dataclass(frozen=True)
class Fault:
    """The `first` call (from 1) of `function` on a file whose path contains `path` fails, and `count` - 1 behind it;
    count 0: all behind it. function: as shim.c has it."""

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
class Ended:
    """A command's exit code, what it printed, and how many of its calls failed."""

    code: int
    output: str
    hits: int


class FaultyCommands:
    """Runs moe-convert under the shim. `folder` is for the library and outputs. Use it as a context."""

    def __init__(self, folder: Path) -> None:
        self._output = folder / "output"
        library = folder / "shim.so"
        subprocess.run([compiler(), "-O1", "-shared", "-fPIC", "-o", library, HERE / "shim.c", "-ldl"], check=True)
        self._server = subprocess.Popen(
            [sys.executable, HERE / "command_server.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "LD_PRELOAD": str(library)},
        )  # fmt: skip

    def run(self, *arguments: object, faults: list[Fault] | None = None) -> Ended:
        """Runs one command to its end."""
        assert self._server.stdin and self._server.stdout
        rules = "\n".join(fault.rule for fault in faults or [])
        task = {"arguments": [str(a) for a in arguments], "rules": rules, "output": str(self._output)}
        self._server.stdin.write(json.dumps(task) + "\n")
        self._server.stdin.flush()
        code, hits = json.loads(self._server.stdout.readline())
        return Ended(code, self._output.read_text(), hits)

    def __enter__(self) -> "FaultyCommands":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin and self._server.stdout
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()


def compiler() -> str:
    """The C compiler; empty where there is none or no LD_PRELOAD."""
    return (shutil.which("cc") or "") if sys.platform == "linux" else ""
