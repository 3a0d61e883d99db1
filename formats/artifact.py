"""Opening a converted folder: the index is compared with all files before a byte is used."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from formats import INDEX_NAME
from formats.config.recorded_config import CONFIG_NAME, read_recorded_config
from formats.errors import DamageError, FormatError, MoeConvertError
from formats.expert import ExpertLayout
from formats.files.io_errors import translated
from formats.files.log_once import warn_once
from formats.files.paths import locate, open_regular
from formats.index import Architecture, ExpertEntry, Index, read_index
from formats.index_checks import index_problems, layer_header_limit, trunk_header_limit
from formats.labels import has_controls
from formats.layer_file import layer_metadata, raw_entries, zstd_entries
from formats.safetensors_header import Header, TensorEntry, read_header
from formats.trunk import check_trunk, trunk_metadata
from formats.unconverted import check_converted

_RESAVED_HINT = (
    "it was cut off, or saved again by a general safetensors tool:"
    " get the file again, or convert again"
)


@dataclass(frozen=True)
class Head:
    """Index and gated config.json of a converted folder."""

    index: Index
    config: dict[str, Any]
    notes: list[str]
    """Changes of config.json since the conversion, one text for each field."""


@dataclass(frozen=True)
class Artifact:
    """A converted folder with checked structure.

    Readers check the experts' bytes; `formats/reading/verify.py` checks the bytes of all files.
    """

    folder: Path
    index: Index
    config: dict[str, Any]

    @classmethod
    def open(cls, folder: str | os.PathLike[str], index_name: str = INDEX_NAME) -> "Artifact":
        """Open `folder`. Raises the first violation of docs/format.md (FormatError, PathError).

        `index_name` is `PENDING_NAME` for a lazy folder, which must not look complete to others.
        """
        path = Path(folder)
        head = read_head(path, index_name)
        if head.notes:
            warn_once(f"{path / CONFIG_NAME}: {'; '.join(head.notes)}")
        for _, problem in structure_problems(path, head.index):
            raise problem
        return cls(path, head.index, head.config)

    @cached_property
    def architecture(self) -> Architecture:
        """The index's architecture, with `num_experts_per_tok` of config.json, which may differ."""
        return replace(
            self.index.architecture, num_experts_per_tok=self.config["num_experts_per_tok"]
        )

    @property
    def packings(self) -> set[str]:
        """Names of all packings used by experts and trunk."""
        return set(self.index.packings)

    def entry(self, layer: int, expert: int) -> ExpertEntry:
        """Return the index entry of an expert. Raises IndexError if it does not exist."""
        return self.index.layers[layer].experts[expert]

    def layout(self, layer: int, expert: int) -> ExpertLayout:
        """Return the layout of an expert."""
        entry = self.entry(layer, expert)
        return ExpertLayout.from_names(self.architecture, entry.gate_up, entry.down)

    def layer_path(self, layer: int) -> Path:
        """Return the real path of a layer's file, with links resolved."""
        return locate(self.folder, self.index.layers[layer].file, str(self.folder))

    def trunk_header(self) -> Header:
        """Read the trunk's header from the file."""
        return _header(self.folder, self.index.trunk.file, trunk_header_limit(self.index.trunk))


def read_head(folder: Path, index_name: str = INDEX_NAME) -> Head:
    """Read index and config.json of `folder`, and compare them with each other."""
    check_converted(folder, index_name)
    index = read_index(folder, index_name)
    config, notes = read_recorded_config(folder, index)
    return Head(index, config, notes)


def structure_problems(folder: Path, index: Index) -> Iterator[tuple[str, MoeConvertError]]:
    """Yield contradictions within `index`, and between `index` and the weight files.

    Each comes with the index's name of the unreliable file. Compares sizes and headers, and reads
    no weights. `index.files` are not compared: an edited tokenizer is no reason to refuse the
    weights, and verify reports it.
    """
    problems = list(index_problems(index, str(folder / INDEX_NAME)))
    yield from problems
    unreliable = {file for file, _ in problems}
    checks: list[tuple[str, Callable[[], None]]] = [
        (layer.file, partial(_check_layer_file, folder, index, n))
        for n, layer in enumerate(index.layers)
    ]
    checks.append((index.trunk.file, partial(_check_trunk_file, folder, index)))
    for file, check in checks:
        try:
            if file not in unreliable:
                check()
        except MoeConvertError as e:
            yield file, e


def _check_layer_file(folder: Path, index: Index, number: int) -> None:
    layer = index.layers[number]
    _check_size(folder, layer.file, layer.size_bytes)
    header = _header(folder, layer.file, layer_header_limit(layer))
    file = str(folder / layer.file)
    first = layer.experts[0]
    layouts = [
        ExpertLayout.from_names(index.architecture, e.gate_up, e.down) for e in layer.experts
    ]
    module = index.architecture.expert_modules[number]
    if first.codec == "none":
        expected = raw_entries(module, layouts)
    else:
        expected = zstd_entries(module, [e.length for e in layer.experts])
    _check_entries(header, expected, file)
    _check_metadata(header, layer_metadata(number, module, layouts, first.codec), file)
    if first.offset != header.data_offset:
        raise FormatError(
            f"{folder / INDEX_NAME}: layers[{number}].experts[0].offset is {first.offset},"
            f" the data of {file} begins at {header.data_offset}"
        )
    if header.sha256 != layer.header_sha256:
        raise DamageError(
            f"{file}: the header's sha256 is {header.sha256}, the index says {layer.header_sha256}",
            _RESAVED_HINT,
        )


def _check_trunk_file(folder: Path, index: Index) -> None:
    trunk = index.trunk
    _check_size(folder, trunk.file, trunk.size_bytes)
    header = _header(folder, trunk.file, trunk_header_limit(trunk))
    for text in (*header.metadata, *header.metadata.values()):
        if has_controls(text):
            raise FormatError(
                f"{folder / trunk.file}: metadata {text[:200]!r} has control characters",
                _RESAVED_HINT,
            )
    check_trunk(header.entries, trunk, str(folder / trunk.file))
    expected = trunk_metadata(index.architecture, trunk.packed)
    _check_metadata(header, {**header.metadata, **expected}, str(folder / trunk.file))
    if header.sha256 != trunk.header_sha256:
        raise DamageError(
            f"{folder / trunk.file}: the header's sha256 is {header.sha256},"
            f" the index says {trunk.header_sha256}",
            _RESAVED_HINT,
        )


def _check_entries(header: Header, expected: list[TensorEntry], file: str) -> None:
    """Check that the header holds exactly the expected tensors, at the expected places."""
    for entry in expected:
        actual = header.entries.get(entry.name)
        if actual is None:
            raise FormatError(f"{file}: tensor {entry.name!r} is missing", _RESAVED_HINT)
        if actual != entry:
            raise FormatError(
                f"{file}: tensor {entry.name!r} is"
                f" {actual.dtype} {list(actual.shape)} at {actual.begin},"
                f" the index says {entry.dtype} {list(entry.shape)} at {entry.begin}",
                _RESAVED_HINT,
            )
    if extra := sorted(header.entries.keys() - {entry.name for entry in expected}):
        raise FormatError(f"{file}: tensor {extra[0]!r} is not in the index", _RESAVED_HINT)


def _check_metadata(header: Header, expected: dict[str, str], file: str) -> None:
    for key in sorted(expected.keys() | header.metadata.keys()):
        actual = header.metadata.get(key)
        wanted = expected.get(key)
        if actual != wanted:
            raise FormatError(
                f"{file}: metadata {key!r} is {actual!r}, the index says {wanted!r}", _RESAVED_HINT
            )


def _check_size(folder: Path, name: str, size_bytes: int) -> None:
    path = locate(folder, name, str(folder))
    with translated(path, "read", DamageError):
        actual_bytes = path.stat().st_size
    if actual_bytes != size_bytes:
        raise DamageError(
            f"{folder / name}: {actual_bytes} bytes, the index says {size_bytes}", _RESAVED_HINT
        )


def _header(folder: Path, name: str, max_bytes: int) -> Header:
    descriptor = open_regular(locate(folder, name, str(folder)))
    try:
        with translated(folder / name, "read", DamageError):
            return read_header(descriptor, str(folder / name), max_bytes)
    finally:
        os.close(descriptor)
