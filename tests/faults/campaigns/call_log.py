"""The log of the calls that changed files (shim.c)."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Call:
    """A call. number: flags of create, offset of write, length of truncate and allocate.

    old: old name of a rename, whose `path` is the new name. data: bytes written.
    """

    function: str
    number: int
    path: str
    old: str
    data: bytes


def read_calls(log: Path) -> list[Call]:
    """The calls of a log, in order."""
    text, position, calls = log.read_bytes(), 0, []
    while position < len(text):
        end = text.index(b"\n", position)
        function, result, number, path, old = text[position:end].decode().split("\t")
        position = end + 1
        n_bytes = int(result) if function == "write" else 0
        calls.append(Call(function, int(number), path, old, text[position : position + n_bytes]))
        position += n_bytes
    return calls
