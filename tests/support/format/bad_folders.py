"""Edits of a converted folder from tests/vectors/bad-folders.json, and a check of the refusal."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from project_paths import VECTORS

from formats.artifact import Artifact
from formats.errors import MoeConvertError

BAD_FOLDERS: list[dict[str, Any]] = json.loads((VECTORS / "bad-folders.json").read_text())


def copy_of_good(parent: Path) -> Path:
    """A fresh copy of the good folder."""
    return Path(shutil.copytree(VECTORS / "folder", parent / "folder"))


def spoil(folder: Path, edit: dict[str, Any]) -> None:
    """Applies one edit of the manifest (tests/vectors/README.md lists the kinds)."""
    path = folder / edit["file"]
    data = path.read_bytes()
    if "at" in edit:
        data = set_json(data, edit["at"], edit["json"])
    if "replace" in edit:
        old, new = (text.encode() for text in edit["replace"])
        assert old in data and len(old) == len(new)
        data = data.replace(old, new, 1)
    if "write_hex" in edit:
        position, new = edit["write_hex"][0], bytes.fromhex(edit["write_hex"][1])
        data = data[:position] + new + data[position + len(new) :]
    data = edit.get("content", data.decode("latin-1")).encode("latin-1")[: edit.get("truncate")]
    data = (
        bytes.fromhex(edit.get("prepend_hex", ""))
        + data
        + bytes.fromhex(edit.get("append_hex", ""))
    )
    path.write_bytes(data)
    if edit.get("delete"):
        path.unlink()


def set_json(data: bytes, pointer: str, raw: str | None) -> bytes:
    """JSON `data` with the text `raw` (None: nothing) at `pointer`, whose last part may be new."""
    value = json.loads(data)
    *parents, last = pointer.split("/")[1:]
    place = value
    for part in parents:
        place = place[int(part) if isinstance(place, list) else part]
    key: Any = int(last) if isinstance(place, list) else last
    if raw is None:
        del place[key]
        return json.dumps(value).encode()
    place[key] = "\0here"
    return json.dumps(value).replace(json.dumps("\0here"), raw).encode()


def refused(folder: Path, error: str, *parts: str) -> MoeConvertError:
    """Open `folder`, which must raise exactly `error` with `parts` in its message; return it."""
    with pytest.raises(MoeConvertError) as caught:
        Artifact.open(folder)
    assert type(caught.value).__name__ == error, caught.value
    for part in parts:
        assert part in caught.value.message, caught.value
    assert caught.value.hint, "no next step"
    return caught.value
