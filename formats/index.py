"""The index of a converted folder: its types, reading and writing (docs/format.md, "Index")."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from formats import FORMAT_VERSION, INDEX_NAME
from formats.config.field_rules import short
from formats.config.model_config import gate_config
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
Projection = Literal["gate_up", "down"]

_FLAT_OBJECT = re.compile(rb"\{\n[^{}]*\}")
_LINE_BREAK = re.compile(rb"\n *")
"""Never within a string, where JSON has \\n."""

CODECS = ("none", "zstd")


class _Part(Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Architecture(_Part, frozen=True):
    """What a reader must know of the model, whatever its type. intermediate_size: of an expert;
    activation: of gate;
    num_hidden_layers: of all decoder layers; expert_modules: the module path of each layer that has
    experts.
    """

    model_type: Label
    activation: Label
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
    expert_modules: Annotated[list[Label], Meta(min_length=1, max_length=1000)]

    @classmethod
    def of_config(cls, config: dict[str, Any], expert_modules: Sequence[str]) -> "Architecture":
        """The numbers of a gated config.json whose model has its experts in `expert_modules`."""
        model_type = MODEL_TYPES[config["model_type"]]
        named = {
            "activation": config["hidden_act"],
            "intermediate_size": config[model_type.expert_width],
            "num_local_experts": config[model_type.experts],
            "expert_modules": list(expert_modules),
        }
        return cls(
            **{
                name: named[name] if name in named else config[name]
                for name in cls.__struct_fields__
            }
        )

    @property
    def expert_layers(self) -> int:
        """How many layers have experts: what files and recipes count as layers."""
        return len(self.expert_modules)


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


class PackedLinear(_Part, frozen=True, omit_defaults=True):
    """The packing and logical shape of a packed matrix of the trunk. input_transform: as in
    LayerFile.
    """

    packing: Label
    rows: Positive
    columns: Positive
    input_transform: Label | None = None


class Trunk(_Part, frozen=True):
    """The file of everything that is not an expert. `packed` is keyed by module:
    model.layers.0.self_attn.q_proj.
    tensors: in the file, without fillers; parameters: numbers that the model has there.
    """

    file: Label
    size_bytes: Natural
    header_sha256: Sha256
    sha256: Sha256
    tensors: Positive
    parameters: Natural
    packed: dict[Label, PackedLinear]


class ExpertEntry(_Part, frozen=True):
    """One expert: `offset` (from the start of the file) and `length` are bytes; checksums are of
    the stored bytes.
    """

    layer: Natural
    expert: Natural
    offset: Natural
    length: Natural
    sha256: Sha256
    xxh3: Xxh3
    gate_up: Label
    down: Label
    codec: Label


class LayerFile(_Part, frozen=True, omit_defaults=True):
    """The file of one layer's experts. input_transform: what the inputs of gate and up, and those
    of down, go through before the packed weights; absent where it is nothing.
    """

    file: Label
    size_bytes: Natural
    header_sha256: Sha256
    experts: list[ExpertEntry]
    input_transform: dict[Projection, Label] = {}


class CopiedFile(_Part, frozen=True):
    """config.json, or a file taken from the source byte for byte; for verification only."""

    file: Label
    size_bytes: Annotated[int, Meta(ge=0, le=MAX_BYTES)]
    sha256: Sha256


class Part(_Part, frozen=True):
    """Some layers of a conversion that several machines made: which, and by what. For information."""

    name: Label
    producer: Producer
    layers: list[Natural]


class Index(_Part, frozen=True, omit_defaults=True):
    """The whole index, in the order in which it is written. config: what config.json said then, as
    `gate_config` gives it; architecture: of the model as it was converted.
    """

    format: Label
    format_version: Natural
    producer: Producer
    source: Source
    config: dict[Label, Any]
    architecture: Architecture
    recipe: Recipe
    packings: list[Label]
    trunk: Trunk
    layers: list[LayerFile]
    files: Annotated[list[CopiedFile], Meta(max_length=MAX_FILES)]
    parts: list[Part] = []

    @property
    def whole_files(self) -> dict[str, tuple[int, str]]:
        """Name -> (size in bytes, sha256) of the files that have a hash as a whole: the trunk, and
        `files`.
        """
        trunk = {self.trunk.file: (self.trunk.size_bytes, self.trunk.sha256)}
        return trunk | {file.file: (file.size_bytes, file.sha256) for file in self.files}


def read_index(folder: Path, name: str = INDEX_NAME) -> Index:
    """The index of `folder`, its file `name`: typed and of a version that this release reads; not
    yet compared with any other file.

    Raises DamageError if there is none (the conversion was not completed), FormatError naming the
    field, VersionError.
    """
    return parse_index(read_small(folder, name, str(folder)), str(folder / name))


def parse_index(data: bytes, where: str) -> Index:
    """The index in `data`; errors as `read_index`, naming `where`."""
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
        # Its hint is about config.json.
        raise FormatError(e.message) from None
    if different := sorted(
        name for name in fields if name not in index.config or index.config[name] != fields[name]
    ):
        found = short(index.config.get(different[0]))
        raise FormatError(
            f"{where}: config: {different[0]} is {found}, expected {short(fields[different[0]])}"
        )
    return index


def dump_index(index: Index) -> bytes:
    """The index as JSON. An object without others in it, such as an expert's entry, stands on one
    line.
    """
    return _FLAT_OBJECT.sub(
        lambda found: _LINE_BREAK.sub(b"", found[0].replace(b",\n", b", \n")), dump(index)
    )


def check_version(version: Any, where: str) -> None:
    """Raises FormatError if `version` is no integer, VersionError if this release does not read it."""
    if type(version) is not int:
        raise FormatError(f"{where}: format_version is {repr(version)[:100]}, not an integer")
    if version != FORMAT_VERSION:
        raise VersionError(
            f"{where}: format_version is {version}; this release reads {FORMAT_VERSION}",
            "update moe-convert" if version > FORMAT_VERSION else "convert the source again",
        )
