"""Verification: the structure of a converted folder, and on request every byte against its sha256."""

import os
from collections.abc import Callable, Iterator
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
from formats.reading.whole_files import RUN_TIME_FILES, file_sha256, generation_note
from formats.repair.repair_hints import index_command, repair_command

Progress = Callable[[int, int], None]
"""Called with (done bytes, total bytes)."""

T = TypeVar("T")

Unit = tuple[str, ExpertEntry | None]
"""What has a sha256: an expert with its file, or a whole file."""


@dataclass(frozen=True)
class Sample:
    """A share (0 to 1) of what has a sha256 of its own: experts, trunk, copied files; another one
    for each seed.
    """

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
class NotRead:
    """What was not hashed: `experts`, and the trunk or files beside the weights."""

    experts: int
    expert_bytes: int
    files: list[str]
    file_bytes: int


@dataclass(frozen=True)
class Report:
    """What a verification looked at and found. `checked_bytes` were hashed. notes: what a user may
    change, and did.
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
    progress: Progress | None = None,
) -> Report:
    """Checks structure, sizes and header hashes of `folder`; with `read_data` also sha256 and
    fillers, of everything or of a `sample`.

    Collects problems instead of raising them; raises only where nothing can be checked (no folder,
    not converted).
    """
    try:
        head = read_head(folder)
    except NotConvertedError:
        raise
    except MoeConvertError as e:
        if not folder.is_dir():
            raise
        problem = Problem(_blamed(INDEX_NAME, folder, e), e.message, e.hint)
        return Report([problem], 0, 0, 0, 0, NotRead(0, 0, [], 0), [])
    index = head.index
    notes = [f"{folder / CONFIG_NAME}: {change}" for change in head.notes]
    found = [*structure_problems(folder, index), *_changed_files(folder, index, notes)]
    problems = []
    for file, error in found:
        blamed = _blamed(file, folder, error)
        problems.append(Problem(blamed, error.message, _hint(blamed, folder, index, error)))
        problems += _lost_experts(folder, index, blamed)
    broken = {file for file, _ in found}
    all_units: list[Unit] = [
        (layer.file, entry) for layer in index.layers for entry in layer.experts
    ]
    all_units += [(name, None) for name in index.whole_files if name not in RUN_TIME_FILES]
    units = [unit for unit in all_units if unit[0] not in broken] if read_data else []
    units = sample.of(units) if sample else units
    checked = _read_units(Artifact(folder, index, head.config), units, problems, progress)
    files = 2 + len(index.layers) + len(index.files)
    total = sum(layer.size_bytes for layer in index.layers) + sum(
        size for size, _ in index.whole_files.values()
    )
    not_read = _not_read(index, all_units, units)
    return Report(
        problems, files, sum(len(n.experts) for n in index.layers), total, checked, not_read, notes
    )


def _changed_files(
    folder: Path, index: Index, notes: list[str]
) -> Iterator[tuple[str, MoeConvertError]]:
    """The files beside the weights that are missing or have another size than they were written
    with; to `notes`, what a user may change.
    """
    for file in index.files:
        try:
            with translated(folder / file.file, "read", DamageError):
                size = locate(folder, file.file, str(folder)).stat().st_size
            if (
                file.file == CONFIG_NAME
                and not notes
                and file_sha256(folder, CONFIG_NAME) != file.sha256
            ):
                notes.append(
                    f"{folder / CONFIG_NAME}: other bytes than were written, the same fields"
                )
            if file.file not in RUN_TIME_FILES and size != file.size_bytes:
                message = f"{folder / file.file}: {size} bytes, the index says {file.size_bytes}"
                raise DamageError(message, "get the file again, if it was not you who changed it")
        except MoeConvertError as e:
            yield file.file, e
    if not (folder / GENERATION_NAME).exists():
        return
    try:
        read_generation_config(
            folder, index.architecture.vocab_size, error=FormatError, converted=True
        )
        notes += [note for note in [generation_note(folder, index)] if note]
    except MoeConvertError as e:
        yield GENERATION_NAME, e


def _not_read(index: Index, all_units: list[Unit], units: list[Unit]) -> NotRead:
    """What is in `all_units` and not in `units`."""
    read = set(map(id, units))
    left = [unit for unit in all_units if id(unit) not in read]
    entries, files = (
        [entry for _, entry in left if entry],
        [file for file, entry in left if not entry],
    )
    file_bytes = sum(index.whole_files[file][0] for file in files)
    return NotRead(len(entries), sum(entry.length for entry in entries), files, file_bytes)


def _read_units(
    artifact: Artifact, units: list[Unit], problems: list[Problem], progress: Progress | None
) -> int:
    """Hashes experts with their fillers, trunk and copied files; gives the number of bytes."""
    index, folder = artifact.index, artifact.folder
    mend, whole = repair_command(folder, index), index.whole_files
    sizes = [entry.length if entry else whole[file][0] for file, entry in units]
    done = 0
    for (file, entry), size in zip(units, sizes, strict=True):
        with _unreadable(file, problems, mend):
            if entry:
                problems += _expert_problems(artifact, entry, mend)
            elif (found := file_sha256(folder, file)) != (expected := whole[file][1]):
                message = f"{folder / file}: its sha256 is {found}, the index says {expected}"
                problems.append(Problem(file, message, mend))
        done += size
        if progress:
            progress(done, sum(sizes))
    return done


@contextmanager
def _unreadable(file: str, problems: list[Problem], hint: str) -> Iterator[None]:
    """Turns a file that cannot be read (a failing disk, one deleted meanwhile) into a problem: the
    rest goes on.
    """
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
        found = Checksums.from_bytes(os.pread(descriptor, entry.length, entry.offset))
        if found.sha256 != entry.sha256:
            yield Problem(
                file,
                f"{place}: its sha256 is {found.sha256}, the index says {entry.sha256}",
                hint,
                **at,
            )
        elif found.xxh3 != entry.xxh3:
            # The bytes are good. Loading compares xxh3 and would blame them.
            where = f"{artifact.folder / INDEX_NAME}: layer {entry.layer} expert {entry.expert}"
            message = f"{where}: xxh3 is {entry.xxh3}, the bytes with the recorded sha256 have {found.xxh3}"
            yield Problem(INDEX_NAME, message, index_command(artifact.folder))
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


def _hint(file: str, folder: Path, index: Index, error: MoeConvertError) -> str:
    if file == INDEX_NAME:
        return index_command(folder)
    return (
        repair_command(folder, index)
        if isinstance(error, FormatError) and file != "config.json"
        else error.hint
    )


def _blamed(file: str, folder: Path, error: MoeConvertError) -> str:
    """The file that is at fault: index or config.json where the message begins with them, else
    `file`.
    """
    return next(
        (n for n in (INDEX_NAME, CONFIG_NAME) if error.message.startswith(str(folder / n))), file
    )
