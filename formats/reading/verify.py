"""Verification of a converted folder: its structure, and on request every byte against sha256."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TypeVar

from formats import ALIGNMENT_BYTES, INDEX_NAME
from formats.artifact import Artifact, read_head, structure_problems
from formats.checksums import Checksums
from formats.config.generation_config import GENERATION_NAME, read_generation_config
from formats.config.recorded_config import CONFIG_NAME
from formats.errors import DamageError, FormatError, MoeConvertError, NotConvertedError
from formats.files.io_errors import io_error, translated
from formats.files.paths import locate, open_regular
from formats.index import ExpertEntry, Index
from formats.progress import Progress, no_progress
from formats.reading.whole_files import RUN_TIME_FILES, file_sha256, generation_note
from formats.repair_hints import index_command, repair_command

T = TypeVar("T")

Unit = tuple[str, ExpertEntry | None]
"""A file and an expert in it, or None for the whole file: the units with a sha256 of their own."""


@dataclass(frozen=True)
class Sample:
    """A random sample of the units. share: 0 to 1. Each seed chooses other units."""

    share: float
    seed: int

    def choose(self, units: list[T]) -> list[T]:
        """Return a sample of `units`, in their order, with at least one of them."""
        count = max(1, round(self.share * len(units))) if units else 0
        return [units[i] for i in sorted(Random(self.seed).sample(range(len(units)), count))]


@dataclass(frozen=True)
class Problem:
    """One problem in a file. layer, expert, offset (bytes): None if they don't apply."""

    file: str
    message: str
    hint: str = ""
    layer: int | None = None
    expert: int | None = None
    offset: int | None = None


@dataclass(frozen=True)
class NotRead:
    """The part of a folder that was not hashed: a number of experts, and whole files by name."""

    experts: int
    expert_bytes: int
    files: list[str]
    file_bytes: int


@dataclass(frozen=True)
class Report:
    """Result of a verification.

    checked_bytes: bytes that were hashed. notes: the user's permitted changes.
    """

    problems: list[Problem]
    files: int
    experts: int
    total_bytes: int
    checked_bytes: int
    not_read: NotRead
    notes: list[str]


def verify_folder(
    folder: Path,
    *,
    read_data: bool = False,
    sample: Sample | None = None,
    progress: Progress = no_progress,
) -> Report:
    """Verify structure, sizes and header hashes of a converted folder.

    read_data: also verify sha256 and fillers, of all units or of a `sample`. Problems are collected
    in the report. Raises NotConvertedError or MoeConvertError only if `folder` is no converted
    folder.
    """
    try:
        head = read_head(folder)
    except NotConvertedError:
        raise
    except MoeConvertError as e:
        if not folder.is_dir():
            raise
        problem = Problem(_file_at_fault(INDEX_NAME, folder, e), e.message, e.hint)
        return Report([problem], 0, 0, 0, 0, NotRead(0, 0, [], 0), [])
    index = head.index
    notes = [f"{folder / CONFIG_NAME}: {change}" for change in head.notes]
    errors = [*structure_problems(folder, index), *_side_file_errors(folder, index, notes)]
    problems = []
    for file, error in errors:
        at_fault = _file_at_fault(file, folder, error)
        problems.append(Problem(at_fault, error.message, _hint(at_fault, folder, index, error)))
        problems += _lost_experts(folder, index, at_fault)
    broken = {file for file, _ in errors}
    all_units: list[Unit] = [
        (layer.file, entry) for layer in index.layers for entry in layer.experts
    ]
    all_units += [(name, None) for name in index.whole_files if name not in RUN_TIME_FILES]
    units = [unit for unit in all_units if unit[0] not in broken] if read_data else []
    units = sample.choose(units) if sample else units
    checked_bytes = _check_units(Artifact(folder, index, head.config), units, problems, progress)
    layer_bytes = sum(layer.size_bytes for layer in index.layers)
    return Report(
        problems,
        files=2 + len(index.layers) + len(index.files),
        experts=sum(len(layer.experts) for layer in index.layers),
        total_bytes=layer_bytes + sum(size for size, _ in index.whole_files.values()),
        checked_bytes=checked_bytes,
        not_read=_not_read(index, all_units, units),
        notes=notes,
    )


def _side_file_errors(
    folder: Path, index: Index, notes: list[str]
) -> Iterator[tuple[str, MoeConvertError]]:
    """Yield (file, error) for side files that are missing or have a wrong size.

    Appends the user's permitted changes to `notes`.
    """
    for file in index.files:
        path = folder / file.file
        try:
            with translated(path, "read", DamageError):
                size = locate(folder, file.file, str(folder)).stat().st_size
            if (
                file.file == CONFIG_NAME
                and not notes
                and file_sha256(folder, CONFIG_NAME) != file.sha256
            ):
                notes.append(f"{path}: other bytes than were written, the same fields")
            if file.file not in RUN_TIME_FILES and size != file.size_bytes:
                raise DamageError(
                    f"{path}: {size} bytes, the index says {file.size_bytes}",
                    "get the file again, unless you changed it",
                )
        except MoeConvertError as e:
            yield file.file, e
    if not (folder / GENERATION_NAME).exists():
        return
    try:
        read_generation_config(
            folder, index.architecture.vocab_size, error=FormatError, converted=True
        )
        if note := generation_note(folder, index):
            notes.append(note)
    except MoeConvertError as e:
        yield GENERATION_NAME, e


def _not_read(index: Index, all_units: list[Unit], units: list[Unit]) -> NotRead:
    """Return the part of `all_units` that is not in `units`."""
    read = set(map(id, units))
    left = [unit for unit in all_units if id(unit) not in read]
    entries = [entry for _, entry in left if entry]
    files = [file for file, entry in left if not entry]
    return NotRead(
        experts=len(entries),
        expert_bytes=sum(entry.length for entry in entries),
        files=files,
        file_bytes=sum(index.whole_files[file][0] for file in files),
    )


def _check_units(
    artifact: Artifact, units: list[Unit], problems: list[Problem], progress: Progress
) -> int:
    """Hash experts with their fillers and whole files; return the number of bytes.

    Appends to `problems`.
    """
    index = artifact.index
    folder = artifact.folder
    repair = repair_command(folder, index)
    whole = index.whole_files
    sizes = [entry.length if entry else whole[file][0] for file, entry in units]
    done = 0
    for (file, entry), size in zip(units, sizes, strict=True):
        with _unreadable(file, problems, repair):
            if entry:
                problems += _expert_problems(artifact, entry, repair)
            elif (sha256 := file_sha256(folder, file)) != (expected := whole[file][1]):
                message = f"{folder / file}: its sha256 is {sha256}, the index says {expected}"
                problems.append(Problem(file, message, repair))
        done += size
        progress("verifying", done, sum(sizes))
    return done


@contextmanager
def _unreadable(file: str, problems: list[Problem], hint: str) -> Iterator[None]:
    """Turn a failed read into a problem, so that verification continues.

    A disk may fail, or a file may be deleted meanwhile.
    """
    try:
        yield
    except OSError as e:
        problems.append(Problem(file, io_error(e, file, "read").message, hint))
    except MoeConvertError as e:
        problems.append(Problem(file, f"{file}: cannot be read: {e}", hint))


def _expert_problems(artifact: Artifact, entry: ExpertEntry, hint: str) -> Iterator[Problem]:
    """Yield the problems of an expert's bytes and of the filler after them."""
    file = artifact.index.layers[entry.layer].file
    place, at = _place(artifact.folder, file, entry)
    descriptor = open_regular(artifact.layer_path(entry.layer))
    try:
        checksums = Checksums.from_bytes(os.pread(descriptor, entry.length, entry.offset))
        if checksums.sha256 != entry.sha256:
            yield Problem(
                file,
                f"{place}: its sha256 is {checksums.sha256}, the index says {entry.sha256}",
                hint,
                **at,
            )
        elif checksums.xxh3 != entry.xxh3:
            # The bytes are right. Loading compares only xxh3 and would report them as damaged.
            yield Problem(
                INDEX_NAME,
                f"{artifact.folder / INDEX_NAME}: layer {entry.layer} expert {entry.expert}: xxh3"
                f" is {entry.xxh3}, the bytes with the recorded sha256 have {checksums.xxh3}",
                index_command(artifact.folder),
            )
        end = entry.offset + entry.length
        if any(os.pread(descriptor, -end % ALIGNMENT_BYTES, end)):
            yield Problem(file, f"{place}: the filler after it is not zero", hint, **at)
    finally:
        os.close(descriptor)


def _lost_experts(folder: Path, index: Index, file: str) -> Iterator[Problem]:
    """Yield a problem for each expert beyond the end of a truncated or missing layer file."""
    size = (folder / file).stat().st_size if (folder / file).is_file() else 0
    for layer in index.layers:
        for entry in layer.experts if layer.file == file else ():
            if entry.offset + entry.length > size:
                place, at = _place(folder, file, entry)
                yield Problem(file, f"{place}: is missing", repair_command(folder, index), **at)


def _place(folder: Path, file: str, entry: ExpertEntry) -> tuple[str, dict[str, int]]:
    """Return an expert's place as text, and as fields of a Problem."""
    place = f"{folder / file}: layer {entry.layer} expert {entry.expert} at offset {entry.offset}"
    return place, {"layer": entry.layer, "expert": entry.expert, "offset": entry.offset}


def _hint(file: str, folder: Path, index: Index, error: MoeConvertError) -> str:
    if file == INDEX_NAME:
        return index_command(folder)
    if isinstance(error, FormatError) and file != CONFIG_NAME:
        return repair_command(folder, index)
    return error.hint


def _file_at_fault(file: str, folder: Path, error: MoeConvertError) -> str:
    """Return INDEX_NAME or CONFIG_NAME if the message begins with that file, else `file`."""
    for name in (INDEX_NAME, CONFIG_NAME):
        if error.message.startswith(str(folder / name)):
            return name
    return file
