"""Rebuild of an index from the files that it describes.

The files give the layers (place, length, checksums, packings and codec of each expert), the trunk's
entry, the fields of config.json, and the architecture. Producer, source, recipe, and the hashes of
copied files are only in the old index: if it lacks one of them, the rebuild is refused. The hashes
are those of the files as they are: damage is not detected, except against hashes of the old index.
"""

import hashlib
import shlex
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from formats import ALIGNMENT_BYTES, FORMAT_VERSION, INDEX_NAME, TRUNK_NAME
from formats.artifact import Artifact
from formats.checksums import Checksums
from formats.config.config_gate import RUN_TIME, gate_config
from formats.config.field_rules import short
from formats.config.recorded_config import CONFIG_NAME
from formats.config.strict_json import parse, typed
from formats.errors import DamageError, FormatError, MoeConvertError
from formats.expert import ExpertLayout
from formats.files.io_errors import translated
from formats.files.partial_file import new_file, write_file
from formats.files.paths import locate, open_regular, read_small
from formats.index import (
    CODECS,
    Architecture,
    CopiedFile,
    ExpertEntry,
    Index,
    Label,
    LayerFile,
    PackedLinear,
    Producer,
    Recipe,
    Source,
    Trunk,
    dump_index,
)
from formats.layer_file import (
    FILLER_PREFIX,
    expert_prefix,
    layer_file_name,
    layer_metadata,
    raw_entries,
    zstd_entries,
)
from formats.safetensors_header import Header, TensorEntry, build_header, read_header
from formats.trunk import parameter_count, without_fillers

_ONLY_IN_INDEX: dict[str, Any] = {
    "producer": Producer,
    "source": Source,
    "recipe": Recipe,
    "files": list[CopiedFile],
}


def rebuild_index(folder: Path) -> Index:
    """Write the index of `folder` again, and return it.

    Raises FormatError, which names the facts that no file states, or an expert whose bytes differ
    from a sha256 in the old index. After an error the old index stays.
    """
    where = str(folder / INDEX_NAME)
    old = _old_index(folder, where)
    kept = {
        name: typed(old[name], kind, f"{where}: {name}") for name, kind in _ONLY_IN_INDEX.items()
    }
    config = _config(folder, old)
    trunk, architecture = _trunk(folder, config)
    with translated(folder, "read", DamageError):
        layers = [_layer(folder, n, architecture) for n in range(architecture.expert_layers)]
    _compare(old, layers, folder)
    used = {name for layer in layers for e in layer.experts for name in (e.gate_up, e.down)}
    used |= {linear.packing for linear in trunk.packed.values()}
    index = Index(
        format="moe-convert",
        format_version=FORMAT_VERSION,
        config=config,
        architecture=architecture,
        packings=sorted(used),
        trunk=trunk,
        layers=layers,
        **kept,
    )
    before = (folder / INDEX_NAME).read_bytes()
    write_file(folder / INDEX_NAME, dump_index(index))
    try:
        Artifact.open(folder)
    except MoeConvertError:
        write_file(folder / INDEX_NAME, before)
        raise
    return index


def _old_index(folder: Path, where: str) -> dict[str, Any]:
    """Return the old index as JSON. It has at least the fields that no other file states.

    Raises FormatError if it lacks one.
    """
    try:
        old = parse(read_small(folder, INDEX_NAME, str(folder)), where)
    except MoeConvertError as e:
        fields = ", ".join(_ONLY_IN_INDEX)
        raise FormatError(
            f"{e.message}; and no other file says {fields}", _fetch_hint(folder)
        ) from None
    missing = [name for name in _ONLY_IN_INDEX if not isinstance(old, dict) or name not in old]
    if missing:
        raise FormatError(
            f"{where}: has no {', '.join(missing)}, and no other file says it", _fetch_hint(folder)
        )
    return dict(old)


def _config(folder: Path, old: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of config.json.

    Raises FormatError if a field that describes the weights differs in the old index.
    """
    where = str(folder / CONFIG_NAME)
    config, _ = gate_config(
        parse(read_small(folder, CONFIG_NAME, str(folder)), where),
        where,
        error=FormatError,
        converted=True,
    )
    recorded = old.get("config")
    for name in sorted(config.keys() - RUN_TIME):
        if isinstance(recorded, dict) and recorded.get(name, config[name]) != config[name]:
            raise FormatError(
                f"{where}: {name} is {short(config[name])}, the index says"
                f" {short(recorded[name])}: one of them is damaged",
                _fetch_hint(folder),
            )
    return config


def _layer(folder: Path, number: int, architecture: Architecture) -> LayerFile:
    """Return a layer's entry. A file whose tensors were moved is written again first."""
    name = layer_file_name(number)
    header, size = _header(folder, name)
    path = folder / name
    _check_metadata(header, ("gate_up", "down", "codec", "module"), path)
    module = header.metadata["module"]
    codec = header.metadata["codec"]
    if module != architecture.expert_modules[number]:
        raise FormatError(
            f"{path}: its metadata names module {short(module)}, {TRUNK_NAME} names"
            f" {short(architecture.expert_modules[number])}: files of several folders are mixed",
            _fetch_hint(folder),
        )
    packings = [header.metadata[key].split(",") for key in ("gate_up", "down")]
    if codec not in CODECS or any(
        len(names) != architecture.num_local_experts for names in packings
    ):
        raise FormatError(
            f"{path}: its metadata has {len(packings[0])} experts and codec {codec!r}, expected"
            f" {architecture.num_local_experts} experts and one of {', '.join(CODECS)}",
            _fetch_hint(folder),
        )
    layouts = [
        ExpertLayout.from_names(architecture, gate_up, down, str(path))
        for gate_up, down in zip(*packings, strict=True)
    ]
    tensors = [_tensors(header, module, expert, codec, str(path)) for expert in range(len(layouts))]
    if codec == "zstd":
        expected = zstd_entries(module, [first.n_bytes for first, *_ in tensors])
    else:
        expected = raw_entries(module, layouts)
    if header.data_offset % ALIGNMENT_BYTES or list(header.entries.values()) != expected:
        _lay_out(path, header, expected, layer_metadata(number, module, layouts, codec))
        return _layer(folder, number, architecture)
    entries = []
    with open(path, "rb") as f:
        for expert, (layout, parts) in enumerate(zip(layouts, tensors, strict=True)):
            begin = header.data_offset + parts[0].begin
            end = header.data_offset + parts[-1].end
            f.seek(begin)
            checksums = Checksums.from_bytes(f.read(end - begin))
            names = layout.gate_up.name, layout.down.name
            entries.append(
                ExpertEntry(number, expert, begin, end - begin, *checksums, *names, codec)
            )
    return LayerFile(name, size, header.sha256, entries)


def _check_metadata(header: Header, keys: tuple[str, ...], path: Path) -> None:
    if missing := [key for key in keys if key not in header.metadata]:
        raise FormatError(
            f"{path}: its metadata lacks {', '.join(missing)}, which the tensors do not show",
            _fetch_hint(path.parent.parent if path.name != TRUNK_NAME else path.parent),
        )


def _tensors(header: Header, module: str, expert: int, codec: str, where: str) -> list[TensorEntry]:
    """Return the tensors of an expert, in the order of its bytes. Raises FormatError."""
    prefix = expert_prefix(module, expert)
    tensors = []
    for name in ["zstd"] if codec == "zstd" else ["gate_up", "down"]:
        tensor = header.entries.get(f"{prefix}.{name}")
        if tensor is None:
            raise FormatError(
                f"{where}: tensor {prefix}.{name} is missing",
                _fetch_hint(Path(where).parent.parent),
            )
        tensors.append(tensor)
    return tensors


def _lay_out(
    path: Path, header: Header, expected: list[TensorEntry], metadata: dict[str, str]
) -> None:
    """Write a layer's file again, with each tensor at its expected place."""
    new = build_header(expected, metadata)
    with open(path, "rb") as old, new_file(path) as out:
        out.write_at(new, 0)
        for entry in expected:
            if entry.name.startswith(FILLER_PREFIX):
                continue
            present = header.entries[entry.name]
            if present.n_bytes != entry.n_bytes:
                raise FormatError(
                    f"{path}: tensor {entry.name!r} has {present.n_bytes} bytes,"
                    f" expected {entry.n_bytes}"
                )
            old.seek(header.data_offset + present.begin)
            out.write_at(old.read(present.n_bytes), len(new) + entry.begin)
        out.truncate(len(new) + expected[-1].end)


def _compare(old: dict[str, Any], layers: list[LayerFile], folder: Path) -> None:
    """Raise FormatError if an expert's sha256 differs from that in the old index."""
    for n, layer in enumerate(layers):
        for entry in layer.experts:
            before = _dig(old, "layers", n, "experts", entry.expert, "sha256")
            if isinstance(before, str) and before != entry.sha256:
                raise FormatError(
                    f"{folder / layer.file}: layer {entry.layer} expert {entry.expert} at offset"
                    f" {entry.offset}: its sha256 is {entry.sha256}, the index says {before}: one"
                    " of them is damaged",
                    _fetch_hint(folder),
                )


def _trunk(folder: Path, config: dict[str, Any]) -> tuple[Trunk, Architecture]:
    """Return the trunk's entry, and the architecture from its metadata and config.json."""
    header, size = _header(folder, TRUNK_NAME)
    path = folder / TRUNK_NAME
    _check_metadata(header, ("model_type", "expert_modules", "packed"), path)
    if (model_type := header.metadata["model_type"]) != config["model_type"]:
        raise FormatError(
            f"{path}: its metadata has model_type {short(model_type)}, {CONFIG_NAME} says"
            f" {config['model_type']!r}",
            _fetch_hint(folder),
        )

    def metadata(key: str, kind: Any) -> Any:
        where = f"{path}: metadata {key}"
        return typed(parse(header.metadata[key].encode(), where), kind, where)

    packed = metadata("packed", dict[Label, PackedLinear])
    modules = metadata(
        "expert_modules", Annotated[list[Label], Meta(min_length=1, max_length=1000)]
    )
    with translated(path, "read", DamageError), open(path, "rb") as f:
        sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    trunk = Trunk(
        file=TRUNK_NAME,
        size_bytes=size,
        header_sha256=header.sha256,
        sha256=sha256,
        tensors=len(without_fillers(header.entries.values())),
        parameters=parameter_count(header.entries.values(), packed),
        packed=packed,
    )
    return trunk, Architecture.of_config(config, modules)


def _fetch_hint(folder: Path) -> str:
    """Return the command that fetches index and weights from a published model."""
    return (
        f"moe-convert repair {shlex.quote(str(folder))} --from OWNER/MODEL"
        "  # where the folder was published"
    )


def _dig(value: Any, *path: str | int) -> Any:
    """Return a value inside damaged JSON, or None if the path leads nowhere."""
    for part in path:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _header(folder: Path, name: str) -> tuple[Header, int]:
    """Return a file's header, and its size in bytes."""
    path = locate(folder, name, str(folder))
    with translated(path, "read", DamageError), open(open_regular(path), "rb") as f:
        return read_header(f.fileno(), str(folder / name)), path.stat().st_size
