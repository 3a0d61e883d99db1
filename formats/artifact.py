"""A converted folder, opened: every number of its index compared with its files, before a byte is
used.
"""

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
from formats.repair.unconverted import check_converted
from formats.safetensors_header import Header, TensorEntry, read_header
from formats.trunk import check_trunk, trunk_metadata

RESAVED_HINT = "it was cut off, or saved again by a general safetensors tool: get the file again, or convert again"


@dataclass(frozen=True)
class Head:
    """Index and gated config.json of a folder; notes: what a user changed in config.json since the
    conversion.
    """

    index: Index
    config: dict[str, Any]
    notes: list[str]


@dataclass(frozen=True)
class Artifact:
    """A converted folder whose structure was checked; the experts' bytes were not
    (formats/reading/verify.py does).
    """

    folder: Path
    index: Index
    config: dict[str, Any]

    @classmethod
    def open(cls, folder: str | os.PathLike[str], index_name: str = INDEX_NAME) -> "Artifact":
        """Opens `folder`. Raises the first problem that the checks of docs/format.md find, as a
        FormatError.

        index_name: of a folder that is still being filled and must not look complete to anybody
        else.
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
        """The index's, with another number of experts a token where a user chose so in config.json."""
        return replace(
            self.index.architecture, num_experts_per_tok=self.config["num_experts_per_tok"]
        )

    @property
    def packings(self) -> set[str]:
        """The names of all that occur, in experts and trunk."""
        entries = [entry for layer in self.index.layers for entry in layer.experts]
        packed = self.index.trunk.packed.values()
        return {name for e in entries for name in (e.gate_up, e.down)} | {
            linear.packing for linear in packed
        }

    def entry(self, layer: int, expert: int) -> ExpertEntry:
        """The index's entry of an expert; IndexError if there is none."""
        return self.index.layers[layer].experts[expert]

    def layout(self, layer: int, expert: int) -> ExpertLayout:
        """The sizes of an expert."""
        entry = self.entry(layer, expert)
        return ExpertLayout.of(self.architecture, entry.gate_up, entry.down)

    def layer_path(self, layer: int) -> Path:
        """The real path of a layer's file."""
        return locate(self.folder, self.index.layers[layer].file, str(self.folder))

    def trunk_header(self) -> Header:
        """The header of the trunk, parsed again."""
        return _header(self.folder, self.index.trunk.file, trunk_header_limit(self.index.trunk))


def read_head(folder: Path, index_name: str = INDEX_NAME) -> Head:
    """The head of `folder`, whose parts were compared with each other and with what this release
    supports.
    """
    check_converted(folder, index_name)
    index = read_index(folder, index_name)
    return Head(index, *read_recorded_config(folder, index))


def structure_problems(folder: Path, index: Index) -> Iterator[tuple[str, MoeConvertError]]:
    """Every disagreement between `index`, itself, and the weight files' sizes and headers. Reads no
    weights.

    Not of `index.files`: a tokenizer that the user has edited is no reason to refuse the weights
    (verify says so). Each comes with the name of the file (as the index has it) whose place or size
    cannot be relied on.
    """
    found = list(index_problems(index, str(folder / INDEX_NAME)))
    yield from found
    checks: list[tuple[str, Callable[[], None]]] = [
        (layer.file, partial(_check_layer_file, folder, index, n))
        for n, layer in enumerate(index.layers)
    ]
    checks.append((index.trunk.file, partial(_check_trunk_file, folder, index)))
    for file, check in checks:
        try:
            if file not in {name for name, _ in found}:
                check()
        except MoeConvertError as e:
            yield file, e


def _check_layer_file(folder: Path, index: Index, number: int) -> None:
    layer = index.layers[number]
    _check_size(folder, layer.file, layer.size_bytes, RESAVED_HINT)
    header = _header(folder, layer.file, layer_header_limit(layer))
    file = str(folder / layer.file)
    first = layer.experts[0]
    layouts = [ExpertLayout.of(index.architecture, e.gate_up, e.down) for e in layer.experts]
    module = index.architecture.expert_modules[number]
    if first.codec == "none":
        expected = raw_entries(module, layouts)
    else:
        expected = zstd_entries(module, [e.length for e in layer.experts])
    _check_entries(header, expected, file)
    _check_metadata(header, layer_metadata(number, module, layouts, first.codec), file)
    if first.offset != header.data_offset:
        raise FormatError(
            f"{folder / INDEX_NAME}: layers[{number}].experts[0].offset is {first.offset}, the data of {file} begins at"
            f" {header.data_offset}"
        )
    if header.sha256 != layer.header_sha256:
        raise DamageError(
            f"{file}: the header's sha256 is {header.sha256}, the index says {layer.header_sha256}",
            RESAVED_HINT,
        )


def _check_trunk_file(folder: Path, index: Index) -> None:
    trunk = index.trunk
    _check_size(folder, trunk.file, trunk.size_bytes, RESAVED_HINT)
    header = _header(folder, trunk.file, trunk_header_limit(trunk))
    for text in (*header.metadata, *header.metadata.values()):
        if has_controls(text):
            raise FormatError(
                f"{folder / trunk.file}: metadata {text[:200]!r} has control characters",
                RESAVED_HINT,
            )
    check_trunk(header.entries, trunk, str(folder / trunk.file))
    expected = trunk_metadata(index.architecture, trunk.packed)
    _check_metadata(header, {**header.metadata, **expected}, str(folder / trunk.file))
    if header.sha256 != trunk.header_sha256:
        raise DamageError(
            f"{folder / trunk.file}: the header's sha256 is {header.sha256}, the index says {trunk.header_sha256}",
            RESAVED_HINT,
        )


def _check_entries(header: Header, expected: list[TensorEntry], file: str) -> None:
    """The header must hold exactly the expected tensors, at the expected places."""
    for entry in expected:
        found = header.entries.get(entry.name)
        if found is None:
            raise FormatError(f"{file}: tensor {entry.name!r} is missing", RESAVED_HINT)
        if found != entry:
            raise FormatError(
                f"{file}: tensor {entry.name!r} is {found.dtype} {list(found.shape)} at {found.begin}, the index says"
                f" {entry.dtype} {list(entry.shape)} at {entry.begin}",
                RESAVED_HINT,
            )
    if extra := sorted(header.entries.keys() - {entry.name for entry in expected}):
        raise FormatError(f"{file}: tensor {extra[0]!r} is not in the index", RESAVED_HINT)


def _check_metadata(header: Header, expected: dict[str, str], file: str) -> None:
    for key in sorted(expected.keys() | header.metadata.keys()):
        found, wanted = header.metadata.get(key), expected.get(key)
        if found != wanted:
            raise FormatError(
                f"{file}: metadata {key!r} is {found!r}, the index says {wanted!r}", RESAVED_HINT
            )


def _check_size(folder: Path, name: str, size_bytes: int, hint: str = "") -> None:
    path = locate(folder, name, str(folder))
    with translated(path, "read", DamageError):
        found = path.stat().st_size
    if found != size_bytes:
        raise DamageError(f"{folder / name}: {found} bytes, the index says {size_bytes}", hint)


def _header(folder: Path, name: str, max_bytes: int) -> Header:
    descriptor = open_regular(locate(folder, name, str(folder)))
    try:
        with translated(folder / name, "read", DamageError):
            return read_header(descriptor, str(folder / name), max_bytes)
    finally:
        os.close(descriptor)
