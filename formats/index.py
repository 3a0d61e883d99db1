"""The index of a converted folder: its types, reading and writing (docs/format.md, "Index")."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from formats import FORMAT_VERSION, INDEX_NAME
from formats.config.config_gate import gate_config
from formats.config.field_rules import short
from formats.config.model_types import MODEL_TYPES
from formats.config.side_files import MAX_BYTES, MAX_FILES
from formats.config.strict_json import dump, parse, typed
from formats.errors import FormatError, VersionError
from formats.files.paths import read_small
from formats.labels import LABEL_PATTERN, MAX_LABEL

Natural = Annotated[int, Meta(ge=0, le=2**53)]
Positive = Annotated[int, Meta(ge=1, le=2**31)]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Xxh3 = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
Label = Annotated[str, Meta(max_length=MAX_LABEL, pattern=LABEL_PATTERN)]
Option = Label | int | float | bool
"""Value of a recipe's option."""

CODECS = ("none", "zstd")
"""Storage of an expert's bytes in the file: as packed, or as one zstd frame."""

_Section = Literal["gate_up", "down"]
_FLAT_OBJECT = re.compile(rb"\{\n[^{}]*\}")
_LINE_BREAK = re.compile(rb"\n *")
"""Only between values: inside a string, JSON escapes line breaks."""


class _Strict(Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Architecture(_Strict, frozen=True):
    """The model's sizes, in the same fields for every model type."""

    model_type: Label
    activation: Label
    """Activation function of gate."""
    hidden_size: Positive
    intermediate_size: Positive
    """Intermediate size of an expert."""
    num_hidden_layers: Annotated[int, Meta(ge=1, le=1000)]
    """Number of decoder layers, with and without experts."""
    num_local_experts: Annotated[int, Meta(ge=1, le=1000)]
    num_experts_per_tok: Annotated[int, Meta(ge=1, le=1000)]
    num_attention_heads: Positive
    num_key_value_heads: Positive
    head_dim: Positive
    vocab_size: Positive
    tie_word_embeddings: bool
    expert_modules: Annotated[list[Label], Meta(min_length=1, max_length=1000)]
    """Module path of the experts of each layer, such as model.layers.0.mlp.experts."""

    @classmethod
    def of_config(cls, config: dict[str, Any], expert_modules: Sequence[str]) -> "Architecture":
        """Read the sizes from a gated config.json; `expert_modules` is the field of that name."""
        model_type = MODEL_TYPES[config["model_type"]]
        fields: dict[str, Any] = {
            name: config[name] for name in cls.__struct_fields__ if name in config
        }
        fields["activation"] = config["hidden_act"]
        fields["intermediate_size"] = config[model_type.expert_width]
        fields["num_local_experts"] = config[model_type.experts]
        fields["expert_modules"] = list(expert_modules)
        return cls(**fields)

    @property
    def expert_layers(self) -> int:
        """Number of decoder layers with experts. Files and recipes count only these."""
        return len(self.expert_modules)


class Shard(_Strict, frozen=True):
    """A weight file of the source checkpoint."""

    name: Label
    size_bytes: Natural
    sha256: Sha256


class Adapter(_Strict, frozen=True):
    """A LoRA adapter that was merged into the source's weights."""

    name: Label
    """Name of the repository or folder."""
    revision: Label | None
    """Commit of a Hub repository; None for a folder."""
    config_sha256: Sha256
    """SHA-256 of adapter_config.json, in hex."""
    weights_sha256: Sha256
    """SHA-256 of adapter_model.safetensors, in hex."""


class Source(_Strict, frozen=True, omit_defaults=True):
    """Origin of the weights."""

    name: Label
    """Name of the repository or folder."""
    revision: Label | None
    """Commit of a Hub repository; None for a folder."""
    shards: list[Shard]
    adapters: Annotated[list[Adapter], Meta(max_length=100)] = []
    """In the order of their merges."""


class Producer(_Strict, frozen=True):
    """The program that wrote the folder."""

    name: Label
    version: Label
    versions: dict[Label, Label]
    """Package -> version, for packages on which the stored numbers depend."""


class Recipe(_Strict, frozen=True):
    """Packing of each part, and the solver. Packing "none": stored as in the source."""

    name: Label
    gate_up: Label
    down: Label
    attention: Label
    solver: Label
    head: Label = "none"
    options: dict[Label, Option] = {}


class PackedLinear(_Strict, frozen=True, omit_defaults=True):
    """Packing and shape [rows, columns] of a packed matrix of the trunk."""

    packing: Label
    rows: Positive
    columns: Positive
    input_transform: Label | None = None
    """Same meaning as `LayerFile.input_transform`."""


class Trunk(_Strict, frozen=True):
    """The file of all tensors that do not belong to an expert."""

    file: Label
    size_bytes: Natural
    header_sha256: Sha256
    sha256: Sha256
    tensors: Positive
    """Number of tensors in the file, without fillers."""
    parameters: Natural
    """Number of the model's parameters in the file."""
    packed: dict[Label, PackedLinear]
    """Module path, such as model.layers.0.self_attn.q_proj -> its packed matrix."""


class ExpertEntry(_Strict, frozen=True):
    """Place, checksums, packings and codec of one expert."""

    layer: Natural
    expert: Natural
    offset: Natural
    """Offset in bytes from the start of the file."""
    length: Natural
    """Stored bytes, without filler. The checksums cover exactly these."""
    sha256: Sha256
    xxh3: Xxh3
    gate_up: Label
    down: Label
    codec: Label


class LayerFile(_Strict, frozen=True, omit_defaults=True):
    """The file of one layer's experts."""

    file: Label
    size_bytes: Natural
    header_sha256: Sha256
    experts: list[ExpertEntry]
    input_transform: dict[_Section, Label] = {}
    """Transform of the inputs of gate and up, or of down, before the product. None exists yet."""


class CopiedFile(_Strict, frozen=True):
    """config.json, or a file copied from the source byte for byte. For verification only."""

    file: Label
    size_bytes: Annotated[int, Meta(ge=0, le=MAX_BYTES)]
    sha256: Sha256


class Part(_Strict, frozen=True):
    """The share of one machine in a conversion by several machines. For information only."""

    name: Label
    producer: Producer
    layers: list[Natural]
    """Numbers of the layers that this machine converted."""


class Index(_Strict, frozen=True, omit_defaults=True):
    """The whole index, in the order of its fields in the file."""

    format: Label
    format_version: Natural
    producer: Producer
    source: Source
    config: dict[Label, Any]
    """The gated fields of config.json at the time of the conversion (`gate_config`)."""
    architecture: Architecture
    """Sizes of the model at the time of the conversion."""
    recipe: Recipe
    packings: list[Label]
    trunk: Trunk
    layers: list[LayerFile]
    files: Annotated[list[CopiedFile], Meta(max_length=MAX_FILES)]
    parts: list[Part] = []

    @property
    def weight_bytes(self) -> int:
        """Size of the trunk's and all layers' files."""
        return self.trunk.size_bytes + sum(layer.size_bytes for layer in self.layers)

    @property
    def whole_files(self) -> dict[str, tuple[int, str]]:
        """Name -> (size in bytes, sha256) of each file with one hash: the trunk and `files`."""
        trunk = {self.trunk.file: (self.trunk.size_bytes, self.trunk.sha256)}
        return trunk | {file.file: (file.size_bytes, file.sha256) for file in self.files}


def read_index(folder: Path, name: str = INDEX_NAME) -> Index:
    """Read and type the index file `name` of `folder`. Compares it with no other file.

    Raises DamageError if the file is missing (an unfinished conversion), VersionError for another
    format version, and FormatError with the name of an invalid field.
    """
    return parse_index(read_small(folder, name, str(folder)), str(folder / name))


def parse_index(data: bytes, where: str) -> Index:
    """Parse an index; errors as in `read_index`, with `where` in their messages."""
    value = parse(data, where)
    if not isinstance(value, dict) or value.get("format") != "moe-convert":
        raise FormatError(
            f"{where}: field format is not 'moe-convert'", "name a folder that moe-convert wrote"
        )
    check_version(value.get("format_version"), where)
    index = typed(value, Index, where)
    try:
        fields, _ = gate_config(index.config, f"{where}: config", error=FormatError, converted=True)
    except FormatError as e:
        # Drop the hint: it is about config.json.
        raise FormatError(e.message) from None
    different = sorted(
        name for name in fields if name not in index.config or index.config[name] != fields[name]
    )
    if different:
        name = different[0]
        actual = short(index.config.get(name))
        raise FormatError(f"{where}: config: {name} is {actual}, expected {short(fields[name])}")
    return index


def dump_index(index: Index) -> bytes:
    """Write the index as JSON.

    An object without nested objects, such as an expert's entry, takes one line.
    """
    return _FLAT_OBJECT.sub(
        lambda match: _LINE_BREAK.sub(b"", match[0].replace(b",\n", b", \n")), dump(index)
    )


def check_version(version: Any, where: str) -> None:
    """Raise VersionError for a format version that this release does not read.

    Raises FormatError if `version` is not an integer.
    """
    if type(version) is not int:
        raise FormatError(f"{where}: format_version is {repr(version)[:100]}, not an integer")
    if version != FORMAT_VERSION:
        raise VersionError(
            f"{where}: format_version is {version}; this release reads {FORMAT_VERSION}",
            "update moe-convert" if version > FORMAT_VERSION else "convert the source again",
        )
