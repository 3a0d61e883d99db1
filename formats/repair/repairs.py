"""Repair: what differs from the index is replaced, from an origin whose bytes must have the index's
sha256.
"""

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
from formats.files.output_file import OutputFile, make_folder, refuse_links
from formats.files.paths import check_name, open_regular
from formats.index import ExpertEntry, Index
from formats.layer_file import (
    aligned,
    expert_prefix,
    layer_metadata,
    partial_path,
    raw_entries,
    zstd_entries,
)
from formats.safetensors_header import Header, build_header, header_from

_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (done bytes, total bytes)."""


class Origin(ABC):
    """Where good bytes come from. What it gives is compared with the index before it is used."""

    @abstractmethod
    def expert(self, entry: ExpertEntry) -> bytes:
        """An expert as it is stored. MoeConvertError where there is none with this sha256."""

    @abstractmethod
    def file(self, name: str, sha256: str, path: Path) -> None:
        """Writes a whole file, trunk or copied, to `path`. MoeConvertError likewise; `path` then is
        as it was.
        """


class NoOrigin(Origin):
    """For what can be mended by the folder alone: headers, fillers, the layout."""

    def __init__(self, hint: str) -> None:
        self._hint = hint

    def expert(self, entry: ExpertEntry) -> bytes:
        raise DamageError(
            f"layer {entry.layer} expert {entry.expert} is damaged, and there is no origin",
            self._hint,
        )

    def file(self, name: str, sha256: str, path: Path) -> None:
        raise DamageError(f"{path} is damaged, and there is no origin", self._hint)


@dataclass(frozen=True)
class Repaired:
    """Files that were written anew, and the experts (layer, expert) that came from the origin;
    kept: files in which a user changed settings.
    """

    files: list[str]
    experts: list[tuple[int, int]]
    kept: list[str] = field(default_factory=list)


def repair_folder(
    folder: Path, index: Index, origin: Origin, progress: Progress | None = None
) -> Repaired:
    """Mends everything in `folder` that is not as `index` says; reads every byte, and writes what
    it must. Keeps a config.json or generation_config.json in which nothing is changed but what a
    user may change.

    A layer's file is written under another name, with its good experts, and renamed: a failure
    leaves the old one. Raises what the origin raises, MoeConvertError for a folder of the Hub's
    cache, and at the end what Artifact.open raises.
    """
    linked = [
        f
        for f in (index.trunk.file, *(layer.file for layer in index.layers))
        if (folder / f).is_symlink()
    ]
    if linked:
        raise MoeConvertError(
            f"{folder / linked[0]} is a link into the Hub's cache, which is never written to",
            f"delete {shlex.quote(os.path.realpath(folder / linked[0]))}, and download the model again",
        )
    names = [
        check_name(name, str(folder))
        for name in (*(f.file for f in index.files), *(n.file for n in index.layers))
    ]
    parents = {str(Path(name).parent) for name in names}
    refuse_links(folder, parents)
    for parent in sorted(parents - {"."}):
        make_folder(folder / parent)
    files, experts, kept = [], [], []
    whole = index.whole_files
    total = sum(size for size, _ in whole.values()) + sum(
        layer.size_bytes for layer in index.layers
    )
    done = 0

    def advance(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        if progress:
            progress(done, total)

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
        found = _mend_layer(folder, index, number, origin)
        if found is not None:
            files.append(layer.file)
            experts += found
        advance(layer.size_bytes)
    Artifact.open(folder)
    return Repaired(files, experts, kept)


def _is_edited(folder: Path, name: str, index: Index) -> bool:
    """True if the file has other bytes only because of settings that a user may change."""
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


def layer_header(index: Index, number: int, own: bytes = b"") -> bytes:
    """The bytes before the data of a layer's file: `own` if they are as the index says, else
    written again.
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
    for header in (own, build_header(entries, layer_metadata(number, module, layouts, codec))):
        if hashlib.sha256(header).hexdigest() == layer.header_sha256:
            return header
    raise DamageError(
        f"{layer.file}: no header has the sha256 {layer.header_sha256} that the index says",
        "the index is damaged, or another program wrote the file: give --from OWNER/MODEL, where it was published",
    )


def _mend_layer(
    folder: Path, index: Index, number: int, origin: Origin
) -> list[tuple[int, int]] | None:
    """Writes a layer's file anew if anything in it is wrong; which experts came from `origin`, None
    if it was good.
    """
    layer = index.layers[number]
    path = folder / check_name(layer.file, str(folder))
    size, read = _opened(path)
    first = layer.experts[0].offset
    own = read(0, first)
    good_header = (
        hashlib.sha256(own).hexdigest() == layer.header_sha256 and size == layer.size_bytes
    )
    header = _parsed(read, size, str(path))
    module = index.architecture.expert_modules[number]
    places = {e.expert: _find(read, header, module, e) for e in layer.experts}
    at_home = all(places[e.expert] == [(e.offset, e.offset + e.length)] for e in layer.experts)
    if (
        good_header
        and at_home
        and not any(any(read(begin, end)) for begin, end in _fillers(layer.experts))
    ):
        return None
    new, experts = layer_header(index, number, own), []
    partial = partial_path(path)
    try:
        with OutputFile(partial) as out:
            out.write_at(new, 0)
            for entry in layer.experts:
                found = places[entry.expert]
                data = (
                    b"".join(read(begin, end) for begin, end in found)
                    if found
                    else origin.expert(entry)
                )
                if hashlib.sha256(data).hexdigest() != entry.sha256:
                    place = f"{path}: layer {number} expert {entry.expert}"
                    raise DamageError(
                        f"{place}: other bytes came than the index says",
                        "run the same command again",
                    )
                if not found:
                    experts.append((number, entry.expert))
                out.write_at(data, entry.offset)
            out.truncate(layer.size_bytes)
            out.finish(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return experts


Places = list[tuple[int, int]]
"""Where bytes lie in a file, begin and end, in order."""
Read = Callable[[int, int], bytes]
"""Bytes begin..end of a file; fewer where it ends."""


def _find(read: Read, header: Header | None, module: str, entry: ExpertEntry) -> Places:
    """Where the expert's good bytes are: where the index says, or where the header has its tensors;
    else nowhere.
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
    """(size, how to read it); of a file that is not there, nothing."""
    if not path.is_file():
        return 0, lambda begin, end: b""

    def read(begin: int, end: int) -> bytes:
        descriptor = open_regular(path)
        try:
            with translated(path, "read", DamageError):
                return os.pread(descriptor, end - begin, begin)
        except DamageError as e:
            # A bad sector is what a repair is for: its bytes come from the origin.
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
