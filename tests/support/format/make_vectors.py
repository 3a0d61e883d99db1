"""Write tests/vectors again. The vectors are seeded; tests compare them with the files.

PYTHONPATH=tests/support python tests/support/format/make_vectors.py
"""

import hashlib
import json
import random
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import torch
from architectures import shape_of
from brute_tiles import GROUP_SIZES, brute_pack, ranges
from expert_bytes import assemble
from project_paths import VECTORS

from converter.checkpoint.model_shape import HEAD, ModelShape
from formats import FORMAT_VERSION
from formats.config.config_gate import gate_config
from formats.config.strict_json import dump
from formats.errors import FormatError
from formats.expert import ExpertLayout
from formats.files.partial_file import write_file
from formats.index import (
    Architecture,
    CopiedFile,
    ExpertEntry,
    Index,
    LayerFile,
    PackedLinear,
    Producer,
    Recipe,
    Shard,
    Source,
    Trunk,
    dump_index,
)
from formats.layer_file import FILLER_PREFIX, aligned, layer_file_name
from formats.packing import PACKINGS, AnyPacking, Packing, tiles_of
from formats.safetensors_header import TensorEntry
from formats.tiles import QuantizedMatrix, dequantize, pack
from formats.trunk import parameter_count, trunk_metadata
from formats.writer import LayerWriter, Place, PlacedFile

CONFIG: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_local_experts": 2,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 8,
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "moe_convert", "format_version": FORMAT_VERSION},
}


def random_matrix(packing: str, rows: int, columns: int, seed: int) -> dict[str, Any]:
    """Return a matrix for the tile vectors in which each value of a code, S or M is likely."""
    rng = random.Random(seed)
    groups = -(-columns // GROUP_SIZES[packing])
    top = ranges(packing)

    def table(width: int, low: int, high: int) -> list[list[int]]:
        return [[rng.randint(low, high) for _ in range(width)] for _ in range(rows)]

    def super_scales() -> list[float]:
        return [
            struct.unpack("<e", struct.pack("<e", rng.uniform(0.0001, 0.02)))[0]
            for _ in range(rows)
        ]

    return {
        "packing": packing,
        "rows": rows,
        "columns": columns,
        "ds": super_scales(),
        "dm": super_scales(),
        "s": table(groups, 0, top.s),
        "m": table(groups, top.m_low, top.m_high),
        "codes": table(columns, 0, top.code),
    }


def example_matrix() -> dict[str, Any]:
    """The worked example of docs/format.md: 2 rows, 20 columns."""
    return {
        "packing": "tile32-q2-g16-s4",
        "rows": 2,
        "columns": 20,
        "ds": [0.5, 0.25],
        "dm": [0.125, 1.0],
        "s": [[3, 10], [15, 1]],
        "m": [[8, 2], [0, 5]],
        "codes": [
            [0, 1, 2, 3, 3, 2, 1, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 0, 3, 1],
            [3, 3, 3, 3, 0, 0, 0, 0, 1, 2, 1, 2, 3, 0, 3, 0, 1, 2, 3, 2],
        ],
    }


def quantized(case: dict[str, Any]) -> QuantizedMatrix:
    """The matrix of a tile vector's JSON."""
    codes = [[int(c) for c in row] for row in case["codes"]]
    return QuantizedMatrix(
        torch.tensor(codes, dtype=torch.uint8),
        torch.tensor(case["s"], dtype=torch.int16),
        torch.tensor(case["m"], dtype=torch.int16),
        torch.tensor(case["ds"], dtype=torch.float16),
        torch.tensor(case["dm"], dtype=torch.float16),
    )


def write_tiles(folder: Path) -> None:
    """One packed tile for each packing, by the byte-by-byte packer, and the example of the format
    page.
    """
    folder.mkdir(parents=True)
    cases = {name: random_matrix(name, 32, 256, seed) for seed, name in enumerate(GROUP_SIZES)}
    for name, case in {**cases, "example": example_matrix()}.items():
        tables = (case["codes"], case["s"], case["m"], case["ds"], case["dm"])
        packed = brute_pack(case["packing"], *tables)
        weights = dequantize(quantized(case), GROUP_SIZES[case["packing"]]).contiguous()
        case["sha256_of_weights_as_float32"] = hashlib.sha256(weights.numpy().tobytes()).hexdigest()
        case["codes"] = ["".join(f"{c:x}" for c in row) for row in case["codes"]]
        lines = [f" {json.dumps(key)}: {_rows(value)}" for key, value in case.items()]
        (folder / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
        (folder / f"{name}.bin").write_bytes(packed)


def _rows(value: Any) -> str:
    """JSON with one row of a table a line."""
    if not isinstance(value, list) or not isinstance(value[0], (list, str)):
        return json.dumps(value)
    return "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in value) + "\n ]"


def write_folder(
    folder: Path,
    *,
    packings: tuple[str, str] = ("tile32-q2-g16-s4", "tile32-q2-g16-s4"),
    codec: str = "none",
    config: dict[str, Any] = CONFIG,
) -> Path:
    """A whole converted folder of seeded codes or weights, written by formats' own writer; gives
    `folder`.
    """
    (folder / "experts").mkdir(parents=True)
    shape = shape_of(config)
    architecture = shape.architecture
    layout = ExpertLayout.from_names(architecture, *packings)
    layers = [
        _write_layer(folder, layer, architecture, layout, codec)
        for layer in range(config["num_hidden_layers"])
    ]
    trunk = _write_trunk(folder, shape)
    license_text = b"A licence, copied byte for byte.\n"
    write_file(folder / "LICENSE", license_text)
    write_file(folder / "config.json", dump(config))
    index = Index(
        format="moe-convert",
        format_version=FORMAT_VERSION,
        producer=Producer("moe-convert", "0", {}),
        source=Source(
            "seeded", None, [Shard("model.safetensors", 0, hashlib.sha256(b"").hexdigest())]
        ),
        config=gate_config(config, "config", error=FormatError, converted=True)[0],
        architecture=architecture,
        recipe=Recipe(
            "custom" if "rows-bf16" in packings else "2bit", *packings, "tile32-q4-g64-s8", "none"
        ),
        packings=sorted({*packings, "tile32-q4-g64-s8"}),
        trunk=trunk,
        layers=layers,
        files=[CopiedFile("LICENSE", len(license_text), hashlib.sha256(license_text).hexdigest())],
    )
    write_file(folder / "moe_index.json", dump_index(index))
    return folder


def expert_blob(layout: ExpertLayout, seed: int) -> torch.Tensor:
    """A seeded expert's bytes, uint8 [n_bytes]."""
    hidden, intermediate = layout.hidden, layout.intermediate

    def stored(packing: AnyPacking, rows: int, columns: int, part: int) -> torch.Tensor:
        if isinstance(packing, Packing):
            return pack(
                quantized(random_matrix(packing.name, rows, columns, 10 * seed + part)), packing
            )
        rng = random.Random(10 * seed + part)
        values = [[rng.randint(-128, 127) / 64 for _ in range(columns)] for _ in range(rows)]
        return torch.tensor(values, dtype=packing.torch_dtype)

    gate, up = (stored(layout.gate_up, intermediate, hidden, part) for part in (1, 2))
    return assemble(layout, gate, up, stored(layout.down, hidden, intermediate, 3))


def _write_layer(
    folder: Path, layer: int, architecture: Architecture, layout: ExpertLayout, codec: str
) -> LayerFile:
    n_experts = architecture.num_local_experts
    path = folder / layer_file_name(layer)
    with LayerWriter(
        path, layer, architecture.expert_modules[layer], [layout] * n_experts
    ) as writer:
        blobs = [expert_blob(layout, 100 * layer + expert) for expert in range(n_experts)]
        digests = [writer.write_expert(expert, blob) for expert, blob in enumerate(blobs)]
        if codec == "none":
            writer.finish()
            header, places = (
                writer.header,
                [
                    Place(o, layout.n_bytes, *d)
                    for o, d in zip(writer.offsets, digests, strict=True)
                ],
            )
        else:
            header, places = writer.finish_zstd([d.xxh3 for d in digests])
    entries = [
        ExpertEntry(layer, expert, *place, layout.gate_up.name, layout.down.name, codec)
        for expert, place in enumerate(places)
    ]
    return LayerFile(
        layer_file_name(layer), path.stat().st_size, hashlib.sha256(header).hexdigest(), entries
    )


def _write_trunk(folder: Path, shape_of_model: ModelShape) -> Trunk:
    packing = PACKINGS["tile32-q4-g64-s8"]
    linears = {module: size for module, size in shape_of_model.linears.items() if module != HEAD}
    packed = {module: PackedLinear(packing.name, *size) for module, size in linears.items()}
    tensors: dict[str, torch.Tensor] = {}
    plain = {
        n: size
        for n, size in shape_of_model.trunk.items()
        if n.removesuffix(".weight") not in linears
    }
    for seed, (name, shape) in enumerate(plain.items()):
        values = [
            random.Random(1000 + seed).randint(-512, 511) / 256
            for _ in range(int(torch.Size(shape).numel()))
        ]
        tensors[name] = torch.tensor(values, dtype=torch.bfloat16).view(shape)
    for seed, (module, (rows, columns)) in enumerate(linears.items()):
        tensors[f"{module}.packed"] = pack(
            quantized(random_matrix(packing.name, rows, columns, 2000 + seed)), packing
        )
        assert tensors[f"{module}.packed"].shape[0] == tiles_of(rows)
    entries: list[TensorEntry] = []
    position = 0
    for name, tensor in tensors.items():
        end = position + tensor.nbytes
        dtype = "U8" if tensor.dtype == torch.uint8 else "BF16"
        entries.append(TensorEntry(name, dtype, tuple(tensor.shape), position, end))
        position = end
    entries.append(
        TensorEntry(
            f"{FILLER_PREFIX}0", "U8", (aligned(position) - position,), position, aligned(position)
        )
    )
    metadata = trunk_metadata(shape_of_model.architecture, packed)
    with PlacedFile(folder / "trunk.safetensors", entries, metadata) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor.view(torch.uint8))
        file.finish()
    data = (folder / "trunk.safetensors").read_bytes()
    return Trunk(
        file="trunk.safetensors",
        size_bytes=len(data),
        header_sha256=hashlib.sha256(file.header).hexdigest(),
        sha256=hashlib.sha256(data).hexdigest(),
        tensors=len(tensors),
        parameters=parameter_count(entries, packed),
        packed=packed,
    )


def header_file(text: bytes, data: bytes = b"") -> bytes:
    """A safetensors file with this header text."""
    return struct.pack("<Q", len(text)) + text + data


def bad_headers() -> dict[str, tuple[bytes, str, str]]:
    """Name -> (file, error, part of the message) for safetensors files that the reader rejects."""

    def tensor(begin: int, end: int, **other: Any) -> str:
        entry = {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end], **other}
        return json.dumps(entry, separators=(",", ":"))

    a, b = tensor(0, 4), tensor(4, 8)
    good = f'{{"a":{a},"b":{b}}}'.encode()

    def one(entry: str, data: bytes = bytes(4)) -> bytes:
        return header_file(f'{{"a":{entry}}}'.encode(), data)

    big = 2**63
    return {
        "empty-file": (b"", "DamageError", "0 bytes, too short"),
        "cut-in-the-length": (b"\x08\0\0", "DamageError", "3 bytes, too short"),
        "cut-in-the-header": (header_file(good)[:40], "DamageError", "cut off inside its header"),
        "cut-in-the-data": (
            header_file(good, bytes(7)),
            "DamageError",
            "7 bytes of data, the header says 8",
        ),
        "bytes-after-the-last-tensor": (
            header_file(good, bytes(9)),
            "DamageError",
            "1 bytes after the last tensor",
        ),
        "header-too-long": (
            struct.pack("<Q", 2**40) + b"{}",
            "FormatError",
            "header of 1099511627776 bytes",
        ),
        "leading-space": (header_file(b" " + good, bytes(8)), "FormatError", "begins with b' '"),
        "byte-order-mark": (
            header_file(b"\xef\xbb\xbf" + good, bytes(8)),
            "FormatError",
            "begins with b'\\xef'",
        ),
        "duplicate-tensor": (
            header_file(f'{{"a":{a},"a":{a}}}'.encode(), bytes(4)),
            "FormatError",
            "'a' stands twice",
        ),
        "duplicate-field": (
            one('{"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]}'),
            "FormatError",
            "'dtype'",
        ),
        "unknown-field": (
            one(tensor(0, 4, extra=1)),
            "FormatError",
            "tensor 'a': fields are not exactly",
        ),
        "unknown-dtype": (one(tensor(0, 4, dtype="U7")), "FormatError", "tensor 'a': dtype 'U7'"),
        "hole": (
            header_file(f'{{"a":{a},"b":{tensor(6, 8)}}}'.encode(), bytes(8)),
            "FormatError",
            "a hole before",
        ),
        "hole-at-the-start": (one(tensor(2, 4)), "FormatError", "a hole before tensor 'a'"),
        "overlap": (
            header_file(f'{{"a":{a},"b":{tensor(2, 8)}}}'.encode(), bytes(8)),
            "FormatError",
            "an overlap before",
        ),
        "size-not-of-the-shape": (
            one(tensor(0, 4, shape=[3])),
            "FormatError",
            "4 bytes, U8 [3] takes 3",
        ),
        "negative-shape": (one(tensor(0, 4, shape=[-4])), "FormatError", "shape [-4]"),
        "float-shape": (one(tensor(0, 4, shape=[4.0])), "FormatError", "shape [4.0]"),
        "boolean-offset": (
            one(tensor(0, 1, data_offsets=[False, True])),
            "FormatError",
            "data_offsets [False, True]",
        ),
        "offset-of-2-to-the-63": (
            one(tensor(0, 4, data_offsets=[0, big])),
            "FormatError",
            f"data_offsets [0, {big}]",
        ),
        "end-before-begin": (
            one(tensor(0, 4, data_offsets=[4, 0])),
            "FormatError",
            "data_offsets [4, 0]",
        ),
        "metadata-not-strings": (
            header_file(b'{"__metadata__":{"a":1}}'),
            "FormatError",
            "__metadata__",
        ),
        "not-an-object": (
            header_file(b'{"a":[]}', bytes(4)),
            "FormatError",
            "tensor 'a': fields are not exactly",
        ),
        "nested-too-deep": (
            header_file(b'{"a":' + b"[" * 9 + b"]" * 9 + b"}"),
            "FormatError",
            "nested more than 4 deep",
        ),
        "text-after-the-object": (header_file(good + b"{}", bytes(8)), "FormatError", "not JSON"),
        "not-json": (header_file(b"{a}"), "FormatError", "not JSON"),
    }


def write_bad_headers(folder: Path) -> None:
    """The files and a manifest: name -> error and part of its message."""
    folder.mkdir(parents=True)
    manifest = {}
    for name, (data, error, message) in bad_headers().items():
        (folder / f"{name}.safetensors").write_bytes(data)
        manifest[name] = {"error": error, "message": message}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def write_vectors(folder: Path) -> None:
    """Everything that is generated."""
    write_tiles(folder / "tiles")
    write_folder(folder / "folder")
    write_folder(folder / "folder-rows", packings=("rows-bf16", "rows-f16"))
    write_bad_headers(folder / "bad-headers")


if __name__ == "__main__":
    for part in ("tiles", "folder", "folder-rows", "bad-headers"):
        shutil.rmtree(VECTORS / part, ignore_errors=True)
    write_vectors(VECTORS)
    print(f"wrote {VECTORS}", file=sys.stderr)
