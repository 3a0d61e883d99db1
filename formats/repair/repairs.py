"""Repair of a folder: parts that differ from the index are replaced from an origin."""

import hashlib
import logging
import os
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from formats.artifact import Artifact
from formats.config.generation_config import GENERATION_NAME, read_generation_config
from formats.config.recorded_config import CONFIG_NAME, read_recorded_config
from formats.errors import DamageError, FormatError, MoeConvertError
from formats.expert import ExpertLayout
from formats.files.io_errors import translated
from formats.files.output_file import make_folder, refuse_links
from formats.files.partial_file import new_file
from formats.files.paths import check_name, open_regular
from formats.index import ExpertEntry, Index
from formats.layer_file import aligned, expert_prefix, layer_metadata, raw_entries, zstd_entries
from formats.progress import Progress, no_progress
from formats.safetensors_header import Header, build_header, header_from

_log = logging.getLogger(__name__)


class Origin(ABC):
    """Source of the right bytes. They are compared with the index before they are used."""

    @abstractmethod
    def expert(self, entry: ExpertEntry) -> bytes:
        """Return an expert's stored bytes. Raises MoeConvertError if none have its sha256."""

    @abstractmethod
    def file(self, name: str, sha256: str, path: Path) -> None:
        """Write a whole file (the trunk or a copied file) to `path`.

        Raises MoeConvertError if the origin has no file with this sha256; `path` stays unchanged.
        """


class NoOrigin(Origin):
    """No origin: only headers, fillers and the layout can be repaired. hint: how to get one."""

    def __init__(self, hint: str) -> None:
        self._hint = hint

    def expert(self, entry: ExpertEntry) -> bytes:
        raise DamageError(
            f"layer {entry.layer} expert {entry.expert} is damaged, and no origin is given",
            self._hint,
        )

    def file(self, name: str, sha256: str, path: Path) -> None:
        raise DamageError(f"{path} is damaged, and no origin is given", self._hint)


@dataclass(frozen=True)
class Repaired:
    """Result of a repair.

    files: files that were rewritten. experts: (layer, expert) that came from the origin. kept:
    files with changed settings of the user.
    """

    files: list[str]
    experts: list[tuple[int, int]]
    kept: list[str] = field(default_factory=list)


def repair_folder(
    folder: Path, index: Index, origin: Origin, progress: Progress = no_progress
) -> Repaired:
    """Repair every part of `folder` that differs from `index`; read all bytes, write only repairs.

    config.json and generation_config.json stay if a user changed only settings that may change. A
    failed repair of a layer's file leaves the old file. Raises the errors of the origin,
    MoeConvertError for a folder of the Hub's cache, and at the end the errors of Artifact.open.
    """
    _refuse_cache(folder, index)
    _make_folders(folder, index)
    files = []
    experts = []
    kept = []
    whole = index.whole_files
    total = sum(size for size, _ in whole.values()) + sum(
        layer.size_bytes for layer in index.layers
    )
    done = 0

    def advance(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        progress("repairing", done, total)

    for name, (size, sha256) in whole.items():
        path = folder / check_name(name, str(folder))
        if _sha256_of(path) == sha256:
            pass
        elif _is_edited(folder, name, index):
            kept.append(name)
        else:
            origin.file(name, sha256, path)
            files.append(name)
        advance(size)
    for number, layer in enumerate(index.layers):
        replaced = _repair_layer(folder, index, number, origin)
        if replaced is not None:
            files.append(layer.file)
            experts += replaced
        advance(layer.size_bytes)
    Artifact.open(folder)
    return Repaired(files, experts, kept)


def _refuse_cache(folder: Path, index: Index) -> None:
    """Raise MoeConvertError if the weights are links, as in a snapshot of the Hub's cache."""
    for name in (index.trunk.file, *(layer.file for layer in index.layers)):
        if (folder / name).is_symlink():
            target = shlex.quote(os.path.realpath(folder / name))
            raise MoeConvertError(
                f"{folder / name} is a link into the Hub's cache, which is never written to",
                f"delete {target}, and download the model again",
            )


def _make_folders(folder: Path, index: Index) -> None:
    """Create the folders of the index's files. Raises PathError, and OutputError for links."""
    files = [file.file for file in index.files] + [layer.file for layer in index.layers]
    parents = {str(Path(check_name(file, str(folder))).parent) for file in files}
    refuse_links(folder, parents)
    for parent in sorted(parents - {"."}):
        make_folder(folder / parent)


def _is_edited(folder: Path, name: str, index: Index) -> bool:
    """True if the file differs only in settings that a user may change."""
    try:
        if name == CONFIG_NAME:
            read_recorded_config(folder, index)
            return True
        vocab_size = index.architecture.vocab_size
        return (
            name == GENERATION_NAME
            and read_generation_config(folder, vocab_size, error=FormatError, converted=True)
            is not None
        )
    except MoeConvertError:
        return False


def _layer_header(index: Index, number: int, present: bytes) -> bytes:
    """Return the bytes before the data of a layer's file.

    They are `present`, those in the file, if the index's sha256 matches, else built again. Raises
    DamageError if neither matches.
    """
    layer = index.layers[number]
    layouts = [
        ExpertLayout.from_names(index.architecture, e.gate_up, e.down) for e in layer.experts
    ]
    module, codec = index.architecture.expert_modules[number], layer.experts[0].codec
    entries = (
        raw_entries(module, layouts)
        if codec == "none"
        else zstd_entries(module, [e.length for e in layer.experts])
    )
    for header in (present, build_header(entries, layer_metadata(number, module, layouts, codec))):
        if hashlib.sha256(header).hexdigest() == layer.header_sha256:
            return header
    raise DamageError(
        f"{layer.file}: no header has the sha256 {layer.header_sha256} that the index says",
        "the index is damaged, or another program wrote the file: give --from OWNER/MODEL, where it"
        " was published",
    )


def _repair_layer(
    folder: Path, index: Index, number: int, origin: Origin
) -> list[tuple[int, int]] | None:
    """Rewrite a layer's file if any part of it differs from the index.

    Returns the experts that came from `origin`, or None if the file was right.
    """
    layer = index.layers[number]
    path = folder / check_name(layer.file, str(folder))
    size, read = _opened(path)
    start = read(0, layer.experts[0].offset)
    header_is_right = (
        hashlib.sha256(start).hexdigest() == layer.header_sha256 and size == layer.size_bytes
    )
    header = _parsed(read, size, str(path))
    module = index.architecture.expert_modules[number]
    places = {e.expert: _find(read, header, module, e) for e in layer.experts}
    all_in_place = all(places[e.expert] == [(e.offset, e.offset + e.length)] for e in layer.experts)
    fillers_are_zero = not any(any(read(begin, end)) for begin, end in _fillers(layer.experts))
    if header_is_right and all_in_place and fillers_are_zero:
        return None
    new = _layer_header(index, number, start)
    experts = []
    with new_file(path) as out:
        out.write_at(new, 0)
        for entry in layer.experts:
            if place := places[entry.expert]:
                data = b"".join(read(begin, end) for begin, end in place)
            else:
                data = origin.expert(entry)
                experts.append((number, entry.expert))
            sha256 = hashlib.sha256(data).hexdigest()
            if sha256 != entry.sha256:
                raise DamageError(
                    f"{path}: layer {number} expert {entry.expert}: other bytes came, of sha256"
                    f" {sha256}; the index says {entry.sha256}",
                    "run the same command again",
                )
            out.write_at(data, entry.offset)
        out.truncate(layer.size_bytes)
    return experts


Places = list[tuple[int, int]]
"""Ranges (begin, end) of a file that hold an expert's bytes, in order; empty if none do."""
Read = Callable[[int, int], bytes]
"""Returns bytes [begin, end) of a file; fewer at its end."""


def _find(read: Read, header: Header | None, module: str, entry: ExpertEntry) -> Places:
    """Return the places of the expert's right bytes.

    They are sought where the index places them, and where the header places its tensors.
    """
    candidates: list[Places] = [[(entry.offset, entry.offset + entry.length)]]
    if header:
        prefix = expert_prefix(module, entry.expert)
        names = (
            [f"{prefix}.zstd"] if entry.codec == "zstd" else [f"{prefix}.gate_up", f"{prefix}.down"]
        )
        tensors = [header.entries[name] for name in names if name in header.entries]
        if len(tensors) == len(names):
            candidates.append(
                [(header.data_offset + t.begin, header.data_offset + t.end) for t in tensors]
            )
    for places in candidates:
        data = b"".join(read(begin, end) for begin, end in places)
        if hashlib.sha256(data).hexdigest() == entry.sha256:
            return places
    return []


def _fillers(experts: list[ExpertEntry]) -> Iterator[tuple[int, int]]:
    for entry in experts:
        end = entry.offset + entry.length
        yield end, aligned(end)


def _opened(path: Path) -> tuple[int, Read]:
    """Return a file's size and a function that reads it; for a missing file 0 and no bytes."""
    if not path.is_file():
        return 0, lambda begin, end: b""

    def read(begin: int, end: int) -> bytes:
        descriptor = open_regular(path)
        try:
            with translated(path, "read", DamageError):
                return os.pread(descriptor, end - begin, begin)
        except DamageError as e:
            # A bad sector is damage to repair: its bytes come from the origin.
            _log.warning("%s", e.message)
            return b""
        finally:
            os.close(descriptor)

    return path.stat().st_size, read


def _parsed(read: Read, size: int, where: str) -> Header | None:
    try:
        return header_from(lambda offset, length: read(offset, offset + length), size, where)
    except MoeConvertError:
        return None


def _sha256_of(path: Path) -> str:
    if not path.is_file():
        return ""
    try:
        with translated(path, "read", DamageError), open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except DamageError as e:
        _log.warning("%s", e.message)
        return ""
