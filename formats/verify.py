"""Verification: the structure of a converted folder, and on request every byte against its sha256."""

import hashlib
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TypeVar

from formats import ALIGNMENT_BYTES, INDEX_NAME
from formats.artifact import Artifact, read_head, structure_problems
from formats.errors import DamageError, FormatError, MoeConvertError, NotConvertedError
from formats.hub import is_repo_name
from formats.index import ExpertEntry, Index
from formats.io_errors import io_error, translated
from formats.paths import locate, open_regular

Progress = Callable[[int, int], None]
"""Called with (done bytes, total bytes)."""

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """A share (0 to 1) of what has a sha256 of its own: experts, trunk, copied files; another one for each seed."""

    share: float
    seed: int

    def of(self, units: list[T]) -> list[T]:
        """At least one of `units`, in their order."""
        count = max(1, round(self.share * len(units))) if units else 0
        return [units[i] for i in sorted(Random(self.seed).sample(range(len(units)), count))]


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


def verify_folder(
    folder: Path, *, read_data: bool = False, sample: Sample | None = None, progress: Progress | None = None
) -> Report:
    """Checks structure, sizes and header hashes of `folder`; with `read_data` also sha256 and fillers, of everything or
    of a `sample`.

    Collects problems instead of raising them; raises only where nothing can be checked (no folder, not converted).
    """
    try:
        index, config = read_head(folder)
    except NotConvertedError:
        raise
    except MoeConvertError as e:
        if not folder.is_dir():
            raise
        return Report([Problem(_blamed(INDEX_NAME, folder, e), e.message, e.hint)], 0, 0, 0, 0)
    found = [*structure_problems(folder, index), *_changed_files(folder, index)]
    problems = []
    for file, error in found:
        blamed = _blamed(file, folder, error)
        problems.append(Problem(blamed, error.message, _hint(blamed, folder, index, error)))
        problems += _lost_experts(folder, index, blamed)
    total = (
        index.trunk.size_bytes
        + sum(layer.size_bytes for layer in index.layers)
        + sum(f.size_bytes for f in index.files)
    )
    checked = 0
    if read_data:
        artifact = Artifact(folder, index, config)
        checked = _read_data(artifact, {file for file, _ in found}, problems, sample, progress)
    files = 2 + len(index.layers) + len(index.files)
    return Report(problems, files, sum(len(layer.experts) for layer in index.layers), total, checked)


def _changed_files(folder: Path, index: Index) -> Iterator[tuple[str, MoeConvertError]]:
    """The files beside the weights that are missing or have another size than they were written with."""
    for file in index.files:
        try:
            with translated(folder / file.file, "read", DamageError):
                size = locate(folder, file.file, str(folder)).stat().st_size
            if size != file.size_bytes:
                message = f"{folder / file.file}: {size} bytes, the index says {file.size_bytes}"
                raise DamageError(message, "get the file again, if it was not you who changed it")
        except MoeConvertError as e:
            yield file.file, e


def _read_data(
    artifact: Artifact, broken: set[str], problems: list[Problem], sample: Sample | None, progress: Progress | None
) -> int:
    """Hashes experts, fillers, trunk and copied files; leaves out files whose structure is broken already."""
    index, folder = artifact.index, artifact.folder
    mend = repair_command(folder, index)
    whole = {index.trunk.file: (index.trunk.size_bytes, index.trunk.sha256)}
    whole |= {f.file: (f.size_bytes, f.sha256) for f in index.files}
    whole = {file: facts for file, facts in whole.items() if file not in broken}
    units: list[ExpertEntry | str] = [e for layer in index.layers if layer.file not in broken for e in layer.experts]
    units += whole
    if sample:
        units = sample.of(units)
    sizes = [whole[unit][0] if isinstance(unit, str) else unit.length for unit in units]
    done = 0
    for unit, size in zip(units, sizes, strict=True):
        file = unit if isinstance(unit, str) else index.layers[unit.layer].file
        with _unreadable(file, problems, mend):
            if isinstance(unit, str):
                found, expected = _file_sha256(folder, unit), whole[unit][1]
                if found != expected:
                    message = f"{folder / unit}: its sha256 is {found}, the index says {expected}"
                    problems.append(Problem(unit, message, mend))
            else:
                problems += _expert_problems(artifact, unit, mend)
        done += size
        if progress:
            progress(done, sum(sizes))
    return done


@contextmanager
def _unreadable(file: str, problems: list[Problem], hint: str) -> Iterator[None]:
    """Turns a file that cannot be read (a failing disk, one deleted meanwhile) into a problem: the rest goes on."""
    try:
        yield
    except OSError as e:
        problems.append(Problem(file, io_error(e, file, "read").message, hint))
    except MoeConvertError as e:
        problems.append(Problem(file, f"{file}: cannot be read: {e}", hint))


def _expert_problems(artifact: Artifact, entry: ExpertEntry, hint: str) -> Iterator[Problem]:
    """What is wrong with an expert's bytes and the filler behind them."""
    file = artifact.index.layers[entry.layer].file
    place, at = _place(artifact.folder, file, entry)
    descriptor = open_regular(artifact.layer_path(entry.layer))
    try:
        found = hashlib.sha256(os.pread(descriptor, entry.length, entry.offset)).hexdigest()
        if found != entry.sha256:
            yield Problem(file, f"{place}: its sha256 is {found}, the index says {entry.sha256}", hint, **at)
        end = entry.offset + entry.length
        if any(os.pread(descriptor, -end % ALIGNMENT_BYTES, end)):
            yield Problem(file, f"{place}: the filler behind it is not zero", hint, **at)
    finally:
        os.close(descriptor)


def _lost_experts(folder: Path, index: Index, file: str) -> Iterator[Problem]:
    """The experts of a layer's file that are not there, because it is cut off or missing."""
    size = (folder / file).stat().st_size if (folder / file).is_file() else 0
    for layer in index.layers:
        for entry in layer.experts if layer.file == file else ():
            if entry.offset + entry.length > size:
                place, at = _place(folder, file, entry)
                yield Problem(file, f"{place}: is not there", repair_command(folder, index), **at)


def _place(folder: Path, file: str, entry: ExpertEntry) -> tuple[str, dict[str, int]]:
    place = f"{folder / file}: layer {entry.layer} expert {entry.expert} at offset {entry.offset}"
    return place, {"layer": entry.layer, "expert": entry.expert, "offset": entry.offset}


def repair_command(folder: Path, index: Index) -> str:
    """The command that mends weights: from where the folder was published, or from what it was made of."""
    mend = f"moe-convert repair {shlex.quote(str(folder))} --from"
    # The index may be a stranger's, and people run what stands here.
    if index.source.revision and is_repo_name(index.source.name):
        return f"{mend} {index.source.name}  # or from where it was published"
    return f"{mend} SOURCE  # the checkpoint, or OWNER/MODEL: where it was published"


def index_command(folder: Path) -> str:
    """The command that brings a good index."""
    mend = f"moe-convert repair {shlex.quote(str(folder))}"
    return f"{mend} --index  # or --from OWNER/MODEL: where it was published"


def _hint(file: str, folder: Path, index: Index, error: MoeConvertError) -> str:
    if file == INDEX_NAME:
        return index_command(folder)
    return repair_command(folder, index) if isinstance(error, FormatError) and file != "config.json" else error.hint


def _file_sha256(folder: Path, name: str) -> str:
    with os.fdopen(open_regular(locate(folder, name, str(folder))), "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _blamed(file: str, folder: Path, error: MoeConvertError) -> str:
    """The file that is at fault: index or config.json where the message begins with them, else `file`."""
    return next((n for n in (INDEX_NAME, "config.json") if error.message.startswith(str(folder / n))), file)
