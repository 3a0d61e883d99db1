"""The index of a converted folder: its types, reading and writing (docs/format.md, "Index")."""

import re
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct

from formats import FORMAT_VERSION, INDEX_NAME
from formats.errors import FormatError, MoeConvertError, VersionError
from formats.field_rules import short
from formats.labels import LABEL_PATTERN, MAX_LABEL
from formats.model_config import gate_config
from formats.paths import read_small
from formats.side_files import MAX_BYTES, MAX_FILES
from formats.strict_json import dump, parse, typed

Natural = Annotated[int, Meta(ge=0, le=2**53)]
Positive = Annotated[int, Meta(ge=1, le=2**31)]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Xxh3 = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
Label = Annotated[str, Meta(max_length=MAX_LABEL, pattern=LABEL_PATTERN)]
Option = Label | int | float | bool

_FLAT_OBJECT = re.compile(rb"\{\n[^{}]*\}")
_LINE_BREAK = re.compile(rb"\n *")
"""Never within a string, where JSON has \\n."""

CODECS = ("none", "zstd")


class _Part(Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Architecture(_Part, frozen=True):
    """The numbers of the model, under the names of its config.json."""

    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Annotated[int, Meta(ge=1, le=1000)]
    num_local_experts: Annotated[int, Meta(ge=1, le=1000)]
    num_experts_per_tok: Annotated[int, Meta(ge=1, le=1000)]
    num_attention_heads: Positive
    num_key_value_heads: Positive
    head_dim: Positive
    vocab_size: Positive
    tie_word_embeddings: bool

    @classmethod
    def from_config(
        cls, config: Any, where: str, *, error: type[MoeConvertError] = FormatError, converted: bool = False
    ) -> "Architecture":
        """The numbers of a Mixtral's config.json, as `gate_config` takes them."""
        fields, _ = gate_config(config, where, error=error, converted=converted)
        return cls(**{name: fields[name] for name in cls.__struct_fields__})


class Shard(_Part, frozen=True):
    """A file of the source checkpoint."""

    name: Label
    size_bytes: Natural
    sha256: Sha256


class Source(_Part, frozen=True):
    """Where the weights came from. `revision` is a commit where the source was a Hub repository."""

    name: Label
    revision: Label | None
    shards: list[Shard]


class Producer(_Part, frozen=True):
    """The program that wrote the folder; `versions` names what its numbers can depend on."""

    name: Label
    version: Label
    versions: dict[Label, Label]


class Recipe(_Part, frozen=True):
    """How the weights were quantized. What has no packing but "none" is as in the source."""

    name: Label
    gate_up: Label
    down: Label
    attention: Label
    solver: Label
    head: Label = "none"
    options: dict[Label, Option] = {}


class PackedLinear(_Part, frozen=True):
    """The packing and logical shape of a packed matrix of the trunk."""

    packing: Label
    rows: Positive
    columns: Positive


class Trunk(_Part, frozen=True):
    """The file of everything that is not an expert. `packed` is keyed by module: model.layers.0.self_attn.q_proj."""

    file: Label
    size_bytes: Natural
    header_sha256: Sha256
    sha256: Sha256
    packed: dict[Label, PackedLinear]


class ExpertEntry(_Part, frozen=True):
    """One expert: `offset` (from the start of the file) and `length` are bytes; checksums are of the stored bytes."""

    layer: Natural
    expert: Natural
    offset: Natural
    length: Natural
    sha256: Sha256
    xxh3: Xxh3
    gate_up: Label
    down: Label
    codec: Label


class LayerFile(_Part, frozen=True):
    """The file of one layer's experts."""

    file: Label
    size_bytes: Natural
    header_sha256: Sha256
    experts: list[ExpertEntry]


class CopiedFile(_Part, frozen=True):
    """config.json, or a file taken from the source byte for byte; for verification only."""

    file: Label
    size_bytes: Annotated[int, Meta(ge=0, le=MAX_BYTES)]
    sha256: Sha256


class Index(_Part, frozen=True):
    """The whole index, in the order in which it is written. config: what config.json said then, as `gate_config`
    gives it."""

    format: Label
    format_version: Natural
    producer: Producer
    source: Source
    config: dict[Label, Any]
    recipe: Recipe
    packings: list[Label]
    trunk: Trunk
    layers: list[LayerFile]
    files: Annotated[list[CopiedFile], Meta(max_length=MAX_FILES)]

    @property
    def architecture(self) -> Architecture:
        """The numbers of `config`."""
        return Architecture(**{name: self.config[name] for name in Architecture.__struct_fields__})

    @property
    def whole_files(self) -> dict[str, tuple[int, str]]:
        """Name -> (size in bytes, sha256) of the files that have a hash as a whole: the trunk, and `files`."""
        trunk = {self.trunk.file: (self.trunk.size_bytes, self.trunk.sha256)}
        return trunk | {file.file: (file.size_bytes, file.sha256) for file in self.files}


def read_index(folder: Path, name: str = INDEX_NAME) -> Index:
    """The index of `folder`, its file `name`: typed and of a version that this release reads; not yet compared with any
    other file.

    Raises DamageError if there is none (the conversion was not completed), FormatError naming the field, VersionError.
    """
    return parse_index(read_small(folder, name, str(folder)), str(folder / name))


def parse_index(data: bytes, where: str) -> Index:
    """The index in `data`; errors as `read_index`, naming `where`."""
    value = parse(data, where)
    if not isinstance(value, dict) or value.get("format") != "moe-convert":
        raise FormatError(f"{where}: field format is not 'moe-convert'", "name a folder that moe-convert wrote")
    check_version(value.get("format_version"), where)
    index = typed(value, Index, where)
    try:
        fields, _ = gate_config(index.config, f"{where}: config", error=FormatError, converted=True)
    except FormatError as e:
        # Its hint is about config.json.
        raise FormatError(e.message) from None
    if different := sorted(name for name in fields if name not in index.config or index.config[name] != fields[name]):
        found = short(index.config.get(different[0]))
        raise FormatError(f"{where}: config: {different[0]} is {found}, expected {short(fields[different[0]])}")
    return index


def dump_index(index: Index) -> bytes:
    """The index as JSON. An object without others in it, such as an expert's entry, stands on one line."""
    return _FLAT_OBJECT.sub(lambda found: _LINE_BREAK.sub(b"", found[0].replace(b",\n", b", \n")), dump(index))


def check_version(version: Any, where: str) -> None:
    """Raises FormatError if `version` is no integer, VersionError if this release does not read it."""
    if type(version) is not int:
        raise FormatError(f"{where}: format_version is {repr(version)[:100]}, not an integer")
    if version != FORMAT_VERSION:
        raise VersionError(
            f"{where}: format_version is {version}; this release reads {FORMAT_VERSION}",
            "update moe-convert" if version > FORMAT_VERSION else "convert the source again",
        )
