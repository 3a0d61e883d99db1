"""Checks of the index against itself, before any other file is opened or fetched."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

from formats import ALIGNMENT_BYTES, EXPERTS_FOLDER, INDEX_NAME, TRUNK_NAME
from formats.config.field_rules import short
from formats.errors import FormatError, MoeConvertError
from formats.expert import ACTIVATION, ExpertLayout
from formats.files.paths import check_name
from formats.index import CODECS, Architecture, ExpertEntry, Index, LayerFile, Trunk
from formats.layer_file import aligned, layer_file_name
from formats.packing import packing_named, tile_packing_named
from formats.safetensors_header import max_header_bytes

_TRUNK_TENSORS_PER_LAYER = 64
"""Bounds the trunk's header, whose size would otherwise follow a number in a stranger's index."""
_MODULE = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*", re.ASCII)


def index_problems(index: Index, where: str) -> Iterator[tuple[str, MoeConvertError]]:
    """Yield each contradiction inside `index`, with the name of the file that it concerns.

    `where` is the index's path, for messages.
    """
    checks: list[tuple[str, Callable[[], None]]] = [
        (INDEX_NAME, partial(check, index, where))
        for check in (_check_architecture, _check_layers, _check_transforms)
    ]
    checks += [
        (layer.file, partial(_check_layer, index, n, where)) for n, layer in enumerate(index.layers)
    ]
    checks.append((index.trunk.file, partial(_check_trunk, index, where)))
    checks += [(INDEX_NAME, partial(_check_file_name, f.file, where)) for f in index.files]
    checks += [
        (INDEX_NAME, partial(check, index, where)) for check in (_check_unique, _check_packings)
    ]
    for file, check in checks:
        try:
            check()
        except MoeConvertError as e:
            yield file, e


def layer_header_limit(layer: LayerFile) -> int:
    """Return the upper bound of a layer file's header in bytes."""
    return max_header_bytes(sum(2 if expert.codec == "none" else 1 for expert in layer.experts))


def trunk_header_limit(trunk: Trunk) -> int:
    """Return the upper bound of the trunk's header in bytes."""
    return max_header_bytes(trunk.tensors)


def _check_architecture(index: Index, where: str) -> None:
    """Compare the architecture with `config`, and check all module paths."""
    here = f"{where}: architecture"
    modules = index.architecture.expert_modules
    if index.architecture.activation != ACTIVATION:
        raise FormatError(
            f"{here}.activation is {index.architecture.activation!r},"
            f" packed experts have {ACTIVATION!r}"
        )
    expected = Architecture.of_config(index.config, modules)
    for name in Architecture.__struct_fields__:
        actual = getattr(index.architecture, name)
        wanted = getattr(expected, name)
        if actual != wanted:
            raise FormatError(f"{here}.{name} is {short(actual)}, config says {short(wanted)}")
    if len(modules) > index.architecture.num_hidden_layers:
        layers = index.architecture.num_hidden_layers
        raise FormatError(
            f"{here}.expert_modules has {len(modules)} entries, of a model with {layers} layers"
        )
    path, count = Counter(modules).most_common(1)[0]
    if count > 1:
        raise FormatError(f"{here}.expert_modules has {short(path)} {count} times")
    for module in (*modules, *index.trunk.packed):
        if not _MODULE.fullmatch(module):
            raise FormatError(f"{where}: {short(module)} is not the path of a module")


def _check_layers(index: Index, where: str) -> None:
    expected = index.architecture.expert_layers
    if len(index.layers) != expected:
        raise FormatError(
            f"{where}: layers has {len(index.layers)} entries, expert_modules has {expected}"
        )


def _check_layer(index: Index, number: int, where: str) -> None:
    layer = index.layers[number]
    here = f"{where}: layers[{number}]"
    if layer.file != layer_file_name(number):
        raise FormatError(f"{here}.file is {layer.file!r}, expected {layer_file_name(number)!r}")
    _check_experts(index, number, here)
    offset = layer.experts[0].offset
    limit = layer_header_limit(layer)
    if offset > limit:
        raise FormatError(f"{here}.experts[0].offset is {offset}, the limit is {limit}")


def _check_trunk(index: Index, where: str) -> None:
    if index.trunk.file != TRUNK_NAME:
        raise FormatError(f"{where}: trunk.file is {index.trunk.file!r}, expected {TRUNK_NAME!r}")
    limit = _TRUNK_TENSORS_PER_LAYER * (index.architecture.num_hidden_layers + 1)
    if index.trunk.tensors > limit:
        raise FormatError(f"{where}: trunk.tensors is {index.trunk.tensors}, the limit is {limit}")
    for module, linear in index.trunk.packed.items():
        tile_packing_named(linear.packing, f"{where}: trunk.packed: {module}")


def _check_transforms(index: Index, where: str) -> None:
    """Refuse any input transform: none exists yet, and the weights are useless without theirs."""
    named = [
        (f"layers[{n}]", name)
        for n, layer in enumerate(index.layers)
        for name in layer.input_transform.values()
    ]
    named += [
        (module, linear.input_transform)
        for module, linear in index.trunk.packed.items()
        if linear.input_transform
    ]
    for place, name in named:
        raise FormatError(f"{where}: {place}.input_transform is {short(name)}, which is unknown")


def _check_file_name(name: str, where: str) -> None:
    check_name(name, where)
    # A download or repair of such a file would overwrite the index or weights.
    if name.lower().startswith((INDEX_NAME, TRUNK_NAME, f"{EXPERTS_FOLDER}/")):
        raise FormatError(
            f"{where}: field files has {name!r}, which is not a file beside index and weights"
        )


def _check_unique(index: Index, where: str) -> None:
    # Some file systems ignore case.
    counts = Counter(file.file.casefold() for file in index.files)
    for name, count in counts.most_common(1):
        if count > 1:
            raise FormatError(f"{where}: field files has {name!r} {count} times")


def _check_packings(index: Index, where: str) -> None:
    used = {
        name
        for layer in index.layers
        for entry in layer.experts
        for name in (entry.gate_up, entry.down)
    }
    used |= {linear.packing for linear in index.trunk.packed.values()}
    if sorted(used) != index.packings:
        raise FormatError(
            f"{where}: field packings is {index.packings}, its entries use {sorted(used)}"
        )
    for name in used:
        packing_named(name, where)


def _check_experts(index: Index, number: int, here: str) -> None:
    """Check order, packings and places of a layer's entries."""
    layer = index.layers[number]
    expected = index.architecture.num_local_experts
    if len(layer.experts) != expected:
        raise FormatError(
            f"{here}.experts has {len(layer.experts)} entries, architecture says {expected} experts"
        )
    position = layer.experts[0].offset
    for i, entry in enumerate(layer.experts):
        place = f"{here}.experts[{i}]"
        if (entry.layer, entry.expert) != (number, i):
            raise FormatError(
                f"{place} is layer {entry.layer} expert {entry.expert};"
                " every expert must stand once, in order"
            )
        if entry.codec not in CODECS or entry.codec != layer.experts[0].codec:
            raise FormatError(
                f"{place}.codec is {entry.codec!r};"
                f" expected one of {', '.join(CODECS)}, the same in a layer"
            )
        _check_length(entry, index.architecture, place)
        if entry.offset % ALIGNMENT_BYTES:
            raise FormatError(
                f"{place}.offset is {entry.offset}, not a multiple of {ALIGNMENT_BYTES}"
            )
        if entry.offset != position:
            fault = "overlaps the expert before" if entry.offset < position else "leaves a gap"
            raise FormatError(
                f"{place}.offset is {entry.offset}, which {fault}; expected {position}"
            )
        end = entry.offset + entry.length
        position = aligned(end)
        if position > layer.size_bytes:
            raise FormatError(
                f"{place} ends at {end}, past the end of {layer.file} at {layer.size_bytes}"
            )
    if position != layer.size_bytes:
        raise FormatError(f"{here}.size_bytes is {layer.size_bytes}, its experts end at {position}")


def _check_length(entry: ExpertEntry, architecture: Architecture, place: str) -> None:
    layout = ExpertLayout.from_names(architecture, entry.gate_up, entry.down, place)
    if entry.codec == "none" and entry.length != layout.n_bytes:
        raise FormatError(
            f"{place}.length is {entry.length}, its packings and architecture take {layout.n_bytes}"
        )
    limit = 2 * layout.n_bytes + ALIGNMENT_BYTES
    if entry.codec == "zstd" and not 0 < entry.length <= limit:
        raise FormatError(
            f"{place}.length is {entry.length}, expected 1 to {limit} for a compressed expert"
            f" of {layout.n_bytes}"
        )
