"""Verification: the structure of a converted folder, and on request every byte against its sha256."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from formats import ALIGNMENT_BYTES, INDEX_NAME
from formats.artifact import Artifact, read_head, structure_problems
from formats.errors import DamageError, MoeConvertError
from formats.index import Index
from formats.paths import locate, open_regular

Progress = Callable[[int, int], None]
"""Called with (done bytes, total bytes)."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. layer, expert and offset (bytes) are there where they apply."""

    file: str
    message: str
    hint: str = ""
    layer: int | None = None
    expert: int | None = None
    offset: int | None = None


@dataclass(frozen=True)
class Report:
    """What a verification looked at and found. `checked_bytes` were hashed."""

    problems: list[Problem]
    files: int
    experts: int
    total_bytes: int
    checked_bytes: int


def verify_folder(folder: Path, *, read_data: bool = False, progress: Progress | None = None) -> Report:
    """Checks structure, sizes and header hashes of `folder`; with `read_data` also sha256 and fillers.

    Collects problems instead of raising them; raises only where nothing can be checked (no folder).
    """
    try:
        index, config = read_head(folder)
    except MoeConvertError as e:
        if not folder.is_dir():
            raise
        return Report([Problem(_blamed(INDEX_NAME, folder, e), e.message, e.hint)], 0, 0, 0, 0)
    found = [*structure_problems(folder, index), *_changed_files(folder, index)]
    problems = [Problem(_blamed(file, folder, e), e.message, e.hint) for file, e in found]
    total = (
        index.trunk.size_bytes
        + sum(layer.size_bytes for layer in index.layers)
        + sum(f.size_bytes for f in index.files)
    )
    checked = 0
    if read_data:
        checked = _read_data(Artifact(folder, index, config), {file for file, _ in found}, problems, progress)
    files = 2 + len(index.layers) + len(index.files)
    return Report(problems, files, sum(len(layer.experts) for layer in index.layers), total, checked)


def _changed_files(folder: Path, index: Index) -> Iterator[tuple[str, MoeConvertError]]:
    """The files beside the weights that are missing or have another size than they were written with."""
    for file in index.files:
        try:
            size = locate(folder, file.file, str(folder)).stat().st_size
            if size != file.size_bytes:
                message = f"{folder / file.file}: {size} bytes, the index says {file.size_bytes}"
                raise DamageError(message, "get the file again, if it was not you who changed it")
        except MoeConvertError as e:
            yield file.file, e


def _read_data(artifact: Artifact, broken: set[str], problems: list[Problem], progress: Progress | None) -> int:
    """Hashes experts, fillers, trunk and copied files; leaves out files whose structure is broken already."""
    index = artifact.index
    layers = [n for n, layer in enumerate(index.layers) if layer.file not in broken]
    whole = [(index.trunk.file, index.trunk.size_bytes, index.trunk.sha256)]
    whole += [(f.file, f.size_bytes, f.sha256) for f in index.files]
    whole = [item for item in whole if item[0] not in broken]
    total = sum(e.length for n in layers for e in index.layers[n].experts) + sum(size for _, size, _ in whole)
    done = 0

    def advance(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        if progress:
            progress(done, total)

    for n in layers:
        with _unreadable(index.layers[n].file, problems):
            _check_layer(artifact, n, problems, advance)
    for name, size, sha256 in whole:
        with _unreadable(name, problems):
            found = _file_sha256(artifact.folder, name)
            if found != sha256:
                message = f"{artifact.folder / name}: its sha256 is {found}, the index says {sha256}"
                problems.append(Problem(name, message, "get the file again"))
        advance(size)
    return done


@contextmanager
def _unreadable(file: str, problems: list[Problem]) -> Iterator[None]:
    """Turns a file that cannot be read (a failing disk, one deleted meanwhile) into a problem: the rest goes on."""
    try:
        yield
    except (OSError, MoeConvertError) as e:
        problems.append(Problem(file, f"{file}: cannot be read: {e}", "get the file again"))


def _check_layer(artifact: Artifact, layer: int, problems: list[Problem], advance: Callable[[int], None]) -> None:
    file = artifact.index.layers[layer]
    descriptor = open_regular(artifact.layer_path(layer))
    try:
        for entry in file.experts:
            data = os.pread(descriptor, entry.length, entry.offset)
            place = f"{artifact.folder / file.file}: layer {layer} expert {entry.expert} at offset {entry.offset}"
            at = {"layer": layer, "expert": entry.expert, "offset": entry.offset}
            hint = "get the file again, or convert again"
            found = hashlib.sha256(data).hexdigest()
            if found != entry.sha256:
                message = f"{place}: its sha256 is {found}, the index says {entry.sha256}"
                problems.append(Problem(file.file, message, hint, **at))
            end = entry.offset + entry.length
            if any(os.pread(descriptor, -end % ALIGNMENT_BYTES, end)):
                problems.append(Problem(file.file, f"{place}: the filler behind it is not zero", hint, **at))
            advance(entry.length)
    finally:
        os.close(descriptor)


def _file_sha256(folder: Path, name: str) -> str:
    with os.fdopen(open_regular(locate(folder, name, str(folder))), "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _blamed(file: str, folder: Path, error: MoeConvertError) -> str:
    """The file that is at fault: index or config.json where the message begins with them, else `file`."""
    return next((n for n in (INDEX_NAME, "config.json") if error.message.startswith(str(folder / n))), file)
