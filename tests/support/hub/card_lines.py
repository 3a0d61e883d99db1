"""Runs the code blocks of a model card as a reader does, each as it stands."""

import io
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest
from hub_server import HubServer
from markdown_it import MarkdownIt
from project_paths import ROOT


@dataclass(frozen=True)
class Block:
    """A code block, and the heading above it."""

    section: str
    language: str
    code: str


def blocks_of(card: str) -> list[Block]:
    """Return the code blocks of a card, in order."""
    section, found = "", []
    tokens = MarkdownIt("commonmark").enable("table").parse(card)
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type == "inline" and before and before.type == "heading_open":
            section = token.content
        if token.type == "fence":
            found.append(Block(section, token.info, token.content))
    return found


def lines_of(card: str, section: str) -> list[str]:
    """Return the lines of a section's code blocks."""
    blocks = [block for block in blocks_of(card) if block.section == section]
    return [line for block in blocks for line in block.code.splitlines()]


class Reader(Protocol):
    """A reader of a card, who works in `folder`."""

    folder: Path

    def shell(self, line: str, typed: str = "") -> str:
        """Run a line of a shell, with `typed` on stdin. Return its stdout."""

    def python(self, code: str) -> str:
        """Run a block of Python. Return its stdout."""


class FreshShell:
    """Each line is a process of its own, with no environment but PATH and the Hub's address."""

    def __init__(self, folder: Path, environ: dict[str, str]) -> None:
        self.folder = folder
        self._environ = environ

    @classmethod
    def of(cls, hub: HubServer, folder: Path) -> "FreshShell":
        """Return a reader without a token, whose caches are empty."""
        folder.mkdir()
        home = folder.parent / f"{folder.name}-home"
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        own = {"PATH": path, "HOME": str(home), "PYTHONPATH": str(ROOT)}
        return cls(folder, own | hub.environ(home / "hf", token=None))

    def shell(self, line: str, typed: str = "") -> str:
        return self._run(["sh", "-c", line], typed)

    def python(self, code: str) -> str:
        return self._run([sys.executable, "-"], code)

    def _run(self, command: list[str], typed: str) -> str:
        options = {"cwd": self.folder, "env": self._environ, "input": typed}
        done = subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]
        assert done.returncode == 0, f"{shlex.join(command)}\n{typed}\n{done.stderr}"
        return str(done.stdout)


class SameProcess:
    """All lines run in this process, which is faster. Its current folder must be `folder`."""

    def __init__(
        self,
        folder: Path,
        run_command: Callable[..., tuple[int, str, str]],
        patch: pytest.MonkeyPatch,
        captured: pytest.CaptureFixture[str],
    ) -> None:
        self.folder = folder
        self._run_command = run_command
        self._patch = patch
        self._captured = captured

    def shell(self, line: str, typed: str = "") -> str:
        program, *words = shlex.split(line)
        assert program == "moe-convert"
        self._patch.setattr("sys.stdin", io.StringIO(typed))
        code, out, err = self._run_command(*words)
        assert code == 0, f"{line}\n{err}"
        return out

    def python(self, code: str) -> str:
        self._captured.readouterr()
        exec(compile(code, "card", "exec"), {})
        return self._captured.readouterr().out
