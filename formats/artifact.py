"""A converted folder, opened: every number of its index compared with its files, before a byte is used."""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from formats import ALIGNMENT_BYTES, EXPERTS_FOLDER, INDEX_NAME, TRUNK_NAME
from formats.errors import DamageError, FormatError, MoeConvertError
from formats.expert import ExpertLayout
from formats.field_rules import short
from formats.index import CODECS, Architecture, ExpertEntry, Index, check_version, read_index
from formats.io_errors import translated
from formats.layer_file import layer_file_name, layer_metadata, raw_entries, zstd_entries
from formats.log_once import warn_once
from formats.model_config import gate_config
from formats.packing import packing_named
from formats.paths import check_name, locate, open_regular, read_small
from formats.safetensors_header import Header, TensorEntry, read_header
from formats.strict_json import parse
from formats.trunk import check_trunk
from formats.unconverted import check_converted

METHOD = "moe_convert"
"""The quant_method by which transformers finds the loader's plugin."""
RUN_TIME = ("num_experts_per_tok",)
"""Numbers of the architecture that config.json may change after the conversion."""
RESAVED_HINT = "it was cut off, or saved again by a general safetensors tool: get the file again, or convert again"


@dataclass(frozen=True)
class Artifact:
    """A converted folder whose structure was checked; the experts' bytes were not (formats/verify.py does)."""

    folder: Path
    index: Index
    config: dict[str, Any]

    @classmethod
    def open(cls, folder: str | os.PathLike[str], index_name: str = INDEX_NAME) -> "Artifact":
        """Opens `folder`. Raises the first problem that the checks of docs/format.md find, as a FormatError.

        index_name: of a folder that is still being filled and must not look complete to anybody else.
        """
        path = Path(folder)
        index, config = read_head(path, index_name)
        for _, problem in structure_problems(path, index):
            raise problem
        return cls(path, index, config)

    @cached_property
    def architecture(self) -> Architecture:
        """The numbers that the index recorded, with the run-time ones of config.json."""
        return replace(self.index.architecture, **{name: self.config[name] for name in RUN_TIME})

    @property
    def packings(self) -> set[str]:
        """The names of all that occur, in experts and trunk."""
        entries = [entry for layer in self.index.layers for entry in layer.experts]
        packed = self.index.trunk.packed.values()
        return {name for e in entries for name in (e.gate_up, e.down)} | {linear.packing for linear in packed}

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
        return _header(self.folder, self.index.trunk.file)


def read_head(folder: Path, index_name: str = INDEX_NAME) -> tuple[Index, dict[str, Any]]:
    """Index and gated config.json of `folder`, compared with each other and with what this release supports.

    Run-time fields of config.json may differ from what the index recorded: one log line says so.
    """
    check_converted(folder, index_name)
    index = read_index(folder, index_name)
    where = str(folder / "config.json")
    data = read_small(folder, "config.json", str(folder))
    raw = parse(data, where)
    if not isinstance(raw, dict):
        raise FormatError(f"{where}: not an object")
    quantization = raw.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        raise FormatError(f"{where}: field quantization_config.quant_method is not {METHOD!r}")
    check_version(quantization.get("format_version"), f"{where}: quantization_config")
    config, notes = gate_config(raw, where, error=FormatError, converted=True)
    if extra := sorted(quantization.keys() - {"quant_method", "format_version", "recipe"}):
        raise FormatError(
            f"{where}: field {short(f'quantization_config.{extra[0]}')} is {short(quantization[extra[0]])}: the"
            " converter writes none",
            f"remove {short(extra[0])} from quantization_config in config.json",
        )
    recipe = quantization.get("recipe", index.recipe.name)
    if recipe != index.recipe.name:
        found = f"{where}: quantization_config.recipe is {short(recipe)}"
        raise FormatError(f"{found}, {folder / INDEX_NAME} says {index.recipe.name!r}")
    for name in Architecture.__struct_fields__:
        ours, theirs = getattr(index.architecture, name), config[name]
        if ours == theirs:
            continue
        if name not in RUN_TIME:
            raise FormatError(f"{where}: {name} is {theirs}, {folder / INDEX_NAME} says {ours}")
        notes.append(f"{name} is {theirs}, {ours} when it was converted")
    if any(f.file == "config.json" and f.sha256 != hashlib.sha256(data).hexdigest() for f in index.files):
        notes.insert(0, "changed since the conversion, and used as it is now")
    if notes:
        warn_once(f"{where}: {'; '.join(notes)}")
    return index, {**config, "quantization_config": quantization}


def structure_problems(folder: Path, index: Index) -> Iterator[tuple[str, MoeConvertError]]:
    """Every disagreement between `index`, itself, and the weight files' sizes and headers. Reads no weights.

    Not of `index.files`: a tokenizer that the user has edited is no reason to refuse the weights (verify says so).
    Each comes with the name of the file (as the index has it) whose place or size cannot be relied on.
    """
    where = str(folder / INDEX_NAME)
    checks: list[tuple[str, Callable[[], None]]] = [(INDEX_NAME, partial(_check_layers, index, where))]
    checks += [(layer.file, partial(_check_layer, folder, index, n, where)) for n, layer in enumerate(index.layers)]
    checks.append((index.trunk.file, partial(_check_trunk_file, folder, index)))
    checks += [(INDEX_NAME, partial(_check_file_name, f.file, where)) for f in index.files]
    checks.append((INDEX_NAME, partial(_check_packings, index, where)))
    for file, check in checks:
        try:
            check()
        except MoeConvertError as e:
            yield file, e


def _check_layers(index: Index, where: str) -> None:
    expected = index.architecture.num_hidden_layers
    if len(index.layers) != expected:
        raise FormatError(f"{where}: layers has {len(index.layers)} entries, config.json says {expected}")


def _check_file_name(name: str, where: str) -> None:
    check_name(name, where)
    # A download or repair of such a file would write over the index or weights.
    if name.lower().startswith((INDEX_NAME, TRUNK_NAME, f"{EXPERTS_FOLDER}/")):
        raise FormatError(f"{where}: field files has {name!r}, which is not a file beside index and weights")


def _check_packings(index: Index, where: str) -> None:
    used = {name for layer in index.layers for entry in layer.experts for name in (entry.gate_up, entry.down)}
    used |= {linear.packing for linear in index.trunk.packed.values()}
    if sorted(used) != index.packings:
        raise FormatError(f"{where}: field packings is {index.packings}, its entries use {sorted(used)}")
    for name in used:
        packing_named(name, where)


def _check_layer(folder: Path, index: Index, number: int, where: str) -> None:
    layer = index.layers[number]
    here = f"{where}: layers[{number}]"
    if layer.file != layer_file_name(number):
        raise FormatError(f"{here}.file is {layer.file!r}, expected {layer_file_name(number)!r}")
    _check_experts(index, number, here)
    _check_size(folder, layer.file, layer.size_bytes, RESAVED_HINT)
    header = _header(folder, layer.file)
    file = str(folder / layer.file)
    first = layer.experts[0]
    layouts = [ExpertLayout.of(index.architecture, e.gate_up, e.down) for e in layer.experts]
    if first.codec == "none":
        expected = raw_entries(number, layouts)
    else:
        expected = zstd_entries(number, [e.length for e in layer.experts])
    _check_entries(header, expected, file)
    metadata = layer_metadata(number, layouts, first.codec)
    for key in sorted(metadata.keys() | header.metadata.keys()):
        found, wanted = header.metadata.get(key), metadata.get(key)
        if found != wanted:
            raise FormatError(f"{file}: metadata {key!r} is {found!r}, the index says {wanted!r}", RESAVED_HINT)
    if first.offset != header.data_offset:
        raise FormatError(
            f"{here}.experts[0].offset is {first.offset}, the data of {file} begins at {header.data_offset}"
        )
    if header.sha256 != layer.header_sha256:
        raise DamageError(
            f"{file}: the header's sha256 is {header.sha256}, the index says {layer.header_sha256}", RESAVED_HINT
        )


def _check_experts(index: Index, number: int, here: str) -> None:
    """Order, packings and places of a layer's entries, against each other."""
    layer = index.layers[number]
    if len(layer.experts) != index.architecture.num_local_experts:
        n = index.architecture.num_local_experts
        raise FormatError(f"{here}.experts has {len(layer.experts)} entries, config.json says {n} experts")
    position: int | None = None
    for i, entry in enumerate(layer.experts):
        at = f"{here}.experts[{i}]"
        if (entry.layer, entry.expert) != (number, i):
            raise FormatError(
                f"{at} is layer {entry.layer} expert {entry.expert}; every expert must stand once, in order"
            )
        if entry.codec not in CODECS or entry.codec != layer.experts[0].codec:
            raise FormatError(
                f"{at}.codec is {entry.codec!r}; expected is one of {', '.join(CODECS)}, the same in a layer"
            )
        layout = ExpertLayout.of(index.architecture, entry.gate_up, entry.down, at)
        if entry.codec == "none" and entry.length != layout.n_bytes:
            raise FormatError(f"{at}.length is {entry.length}, its packings and config.json take {layout.n_bytes}")
        if entry.codec == "zstd" and not 0 < entry.length <= 2 * layout.n_bytes + ALIGNMENT_BYTES:
            raise FormatError(f"{at}.length is {entry.length}, of a compressed expert of {layout.n_bytes}")
        if entry.offset % ALIGNMENT_BYTES:
            raise FormatError(f"{at}.offset is {entry.offset}, not a multiple of {ALIGNMENT_BYTES}")
        if position is not None and entry.offset != position:
            what = "overlaps the expert before" if entry.offset < position else "leaves a gap"
            raise FormatError(f"{at}.offset is {entry.offset}, which {what}; expected {position}")
        end = entry.offset + entry.length
        position = end + -end % ALIGNMENT_BYTES
        if position > layer.size_bytes:
            raise FormatError(f"{at} ends at {end}, past the end of {layer.file} at {layer.size_bytes}")
    if position != layer.size_bytes:
        raise FormatError(f"{here}.size_bytes is {layer.size_bytes}, its experts end at {position}")


def _check_trunk_file(folder: Path, index: Index) -> None:
    trunk = index.trunk
    if trunk.file != TRUNK_NAME:
        raise FormatError(f"{folder / INDEX_NAME}: trunk.file is {trunk.file!r}, expected {TRUNK_NAME!r}")
    _check_size(folder, trunk.file, trunk.size_bytes, RESAVED_HINT)
    header = _header(folder, trunk.file)
    check_trunk(header.entries, index.architecture, trunk.packed, str(folder / trunk.file))
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


def _check_size(folder: Path, name: str, size_bytes: int, hint: str = "") -> None:
    path = locate(folder, name, str(folder))
    with translated(path, "read", DamageError):
        found = path.stat().st_size
    if found != size_bytes:
        raise DamageError(f"{folder / name}: {found} bytes, the index says {size_bytes}", hint)


def _header(folder: Path, name: str) -> Header:
    descriptor = open_regular(locate(folder, name, str(folder)))
    try:
        with translated(folder / name, "read", DamageError):
            return read_header(descriptor, str(folder / name))
    finally:
        os.close(descriptor)
