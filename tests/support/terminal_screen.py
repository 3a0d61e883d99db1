"""Run a command on a terminal of a given size, and return the text on its screen."""

import os
import pty
import struct
import subprocess
import sys
from collections.abc import Sequence

import pyte
from project_paths import ROOT

if sys.platform != "win32":
    import fcntl
    import termios


def screen_of(command: Sequence[str], columns: int, rows: int = 24) -> list[str]:
    """Return the lines of the screen after `command`, without empty lines at the end."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    environ = os.environ | {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
    environ.pop("COLUMNS", None)
    environ.pop("LINES", None)
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environ)
    os.close(theirs)
    screen = pyte.Screen(columns, rows)
    stream = pyte.ByteStream(screen)
    while data := _read(ours):
        stream.feed(data)
    os.close(ours)
    assert process.wait(60) == 0, "\n".join(screen.display)
    lines = [line.rstrip() for line in screen.display]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:
        # Linux raises EIO once the last process has closed the terminal.
        return b""
