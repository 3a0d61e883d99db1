"""Parsers of bytes from strangers, each as a function of bytes with a corpus of good and bad
inputs.

An input may be refused by a MoeConvertError with a short message; anything else that a target
raises is a fault.
"""

import json
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard
from bad_folders import BAD_FOLDERS, VECTORS, copy_of_good, spoil
from made_traces import random_experts, trace_of
from make_checkpoint import SHAPES, make_checkpoint

from converter.checkpoint.source import Checkpoint
from converter.journal.journal_file import JOURNAL_NAME, Journal, read_pin
from converter.journal.records import (
    ExpertRecord,
    LayerRecord,
    LinearRecord,
    ProjectionErrors,
    ShardRecord,
    TensorRecord,
)
from converter.output.planned_folder import PlannedFolder
from converter.recipe.bit_rules import parse_rules
from converter.recipe.recipe_file import recipe_settings
from converter.recipe.recipes import make_recipe
from converter.squared_error import SquaredError
from formats.checksums import xxh3_of
from formats.config.strict_json import parse
from formats.errors import MoeConvertError
from formats.quality import read_quality
from formats.reading.verify import verify_folder
from formats.repair.index_rebuild import rebuild_index
from formats.safetensors_header import header_from
from formats.sizes import parse_size
from formats.writer import Place
from loader.traces.trace import read_trace, write_trace

MAX_MESSAGE = 5000
"""Characters. A longer message repeats the input."""

LAYER_FILE = "experts/layer-000.safetensors"


@dataclass(frozen=True)
class Target:
    """A parser. `parse` takes an input; mutation starts from the inputs of `corpus`."""

    corpus: list[bytes]
    parse: Callable[[bytes], object]
    prefix_bytes: int = 0
    """Bytes before the JSON of an input that choose what is replaced; 0 if the input is the JSON or
    no JSON.
    """

    def run(self, data: bytes) -> bool:
        """True if `data` is accepted, False if it raises a MoeConvertError; others are faults."""
        try:
            self.parse(data)
        except MoeConvertError as e:
            if len(str(e)) > MAX_MESSAGE:
                raise RuntimeError(f"a message of {len(str(e))} characters") from e
            return False
        return True


def _spoiled(folder: Path, file: str) -> list[bytes]:
    """Return `file` of the good folder, and its bytes after each edit of the bad-folder vectors."""
    good = copy_of_good(folder)
    original = (good / file).read_bytes()
    found = [original]
    for edit in BAD_FOLDERS:
        if edit["file"] == file and not edit.get("delete"):
            spoil(good, edit)
            found.append((good / file).read_bytes())
            (good / file).write_bytes(original)
    shutil.rmtree(good)
    return found


def _verified_file(file: str) -> Callable[[Path], Target]:
    """Target: a converted folder in which `file` is the input."""

    def target(scratch: Path) -> Target:
        corpus = _spoiled(scratch, file)
        folder = copy_of_good(scratch)

        def run(data: bytes) -> None:
            (folder / file).write_bytes(data)
            verify_folder(folder)

        return Target(corpus, run)

    return target


def _header_bytes(path: Path) -> bytes:
    """The JSON of a safetensors file's header, without the length before it."""
    data = path.read_bytes()
    return data[8 : 8 + int.from_bytes(data[:8], "little")].rstrip(b" ")


def _with_length(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


def _header(scratch: Path) -> Target:
    good = VECTORS / "folder" / LAYER_FILE
    bad = sorted((VECTORS / "bad-headers").glob("*.safetensors"))
    data_bytes = good.stat().st_size - 4096

    def run(data: bytes) -> None:
        # An input that begins as JSON gets its length and the good file's data, so that mutations
        # reach the parser.
        file, more = (_with_length(data), data_bytes) if data[:1] == b"{" else (data, 0)
        header_from(lambda offset, length: file[offset : offset + length], len(file) + more, "file")

    return Target([_header_bytes(good), *(file.read_bytes() for file in bad)], run)


def _layer_file(scratch: Path) -> Target:
    folder = copy_of_good(scratch)
    path = folder / LAYER_FILE
    original = path.read_bytes()
    experts = original[4096:]

    def run(data: bytes) -> None:
        path.write_bytes(_with_length(data) + experts)
        report = verify_folder(folder)
        assert report.problems or path.read_bytes() == original, (
            "another header passes for the one in the index"
        )

    return Target([_header_bytes(path)], run)


def _rebuild(scratch: Path) -> Target:
    folder = copy_of_good(scratch)
    names = ["moe_index.json", "config.json", LAYER_FILE]
    good = {name: (folder / name).read_bytes() for name in names}
    inputs = {name: good[name] for name in names[:2]} | {
        LAYER_FILE: _header_bytes(folder / LAYER_FILE)
    }

    def run(data: bytes) -> None:
        name, content = names[data[0] % 3 if data else 0], data[1:]
        if name == LAYER_FILE:
            content = _with_length(content) + good[name][4096:]
        (folder / name).write_bytes(content)
        try:
            rebuild_index(folder)
        finally:
            for file, original in good.items():
                (folder / file).write_bytes(original)

    return Target([bytes([i]) + inputs[name] for i, name in enumerate(names)], run, prefix_bytes=1)


def _journal(scratch: Path) -> Target:
    fingerprint = {"recipe": {"name": "2bit"}, "hub": {"repo": "a/b", "commit": "0" * 40}}
    journal = Journal(scratch, fingerprint)
    sha256, xxh3, error = "0" * 64, "0" * 32, SquaredError(0.5, 2.0)
    journal.append(
        ExpertRecord(0, 1, sha256, xxh3, ProjectionErrors(error, error, error), 12, ["down"])
    )
    journal.append(LinearRecord("model.layers.0.self_attn.q_proj", xxh3, error))
    journal.append(TensorRecord("model.norm.weight", xxh3))
    journal.append(LayerRecord(0, 8192, sha256, [Place(4096, 4096, sha256, xxh3)]))
    journal.append(ShardRecord("model.safetensors", sha256))
    journal.close()
    path = scratch / JOURNAL_NAME

    def run(data: bytes) -> None:
        # Lines get their checksums, so that mutations reach the decoder.
        lines = [line.partition(b" ")[2] for line in data.split(b"\n")[:-1]]
        path.write_bytes(
            b"".join(xxh3_of(line).encode() + b" " + line + b"\n" for line in lines) or data
        )
        read_pin(scratch)
        Journal(scratch, fingerprint).close()

    return Target([path.read_bytes()], run)


def _recipe(scratch: Path) -> Target:
    recipes: list[dict[str, Any]] = [
        {"name": "2bit", "rules": ["0-3/down=3bit", "5:0-1=4bit"], "calibrate": "none"},
        {"name": "4bit", "attn_bits": 16, "head_bits": 4, "group_size": 64, "solver": "hqq"},
        {"bits": 3, "target_bpw": 3.4, "down_width": "full", "calibration_tokens": 4096},
        {"gate_up": "tile32-q2-g16-s8", "down": "rows-bf16", "down_width": 1024},
    ]
    path = scratch / "recipe.json"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        make_recipe(**recipe_settings(str(path)))

    return Target([json.dumps(recipe).encode() for recipe in recipes], run)


def _rules(scratch: Path) -> Target:
    corpus = [b"0-3/down=3bit", b"*:0-1,3=16bit,5/gate_up=tile32-q4-g64-s8", b"28-31=4bit"]
    return Target(corpus, lambda data: parse_rules(data.decode("utf-8", "replace")))


def _sizes(scratch: Path) -> Target:
    return Target(
        [b"8GiB", b"12 GB", b"1.5e9", b"512MiB"],
        lambda data: parse_size(data.decode("utf-8", "replace")),
    )


def _quality(scratch: Path) -> Target:
    error = {"gate": 0.1, "up": 0.2, "down": 0.3}
    comparison = {
        "name": "text.txt",
        "windows": 2,
        "tokens": 512,
        "perplexity": 5.5,
        "original_perplexity": 5.0,
        "ratio": 1.1,
        "ratio_error": 0.01,
        "kl": 0.02,
        "kl_error": None,
        "agreement": 0.9,
        "routers": [0.9],
        "sha256": "0" * 64,
    }
    quality = {
        "measure": "relative weight error",
        "totals": error | {"experts": 0.2, "attention": 0.0},
        "experts": [{"layer": 0, "expert": 0, "calibration_tokens": 12} | error],
        "trunk": {"model.layers.0.self_attn.q_proj": 0.1},
        "uncalibrated": ["layer 0 expert 1 down"],
    }
    texts = {"texts": [comparison], "overall": comparison}
    evaluation = {"original": "m", "window": 256, "versions": {"torch": "2"}} | texts

    def run(data: bytes) -> None:
        (scratch / "quality.json").write_bytes(data)
        read_quality(scratch)

    return Target(
        [json.dumps(value).encode() for value in (quality, quality | {"evaluation": evaluation})],
        run,
    )


def _trace(scratch: Path) -> Target:
    path = scratch / "made.trace"
    corpus = []
    for layers in (1, 3):
        write_trace(path, trace_of(random_experts(layers, 5, layers)))
        corpus.append(zstandard.decompress(path.read_bytes(), max_output_size=1 << 20))
    corpus.append(path.read_bytes())
    compressor = zstandard.ZstdCompressor(level=1)

    def run(data: bytes) -> None:
        # What is no frame becomes one, so that mutations of the header line reach the parser.
        path.write_bytes(data if data[:4] == b"\x28\xb5\x2f\xfd" else compressor.compress(data))
        read_trace(path)

    return Target(corpus, run)


def _plan(scratch: Path) -> Target:
    recipe = make_recipe("2bit", solver="hqq")
    config = (VECTORS / "folder/config.json").read_bytes()
    plain = {
        key: value for key, value in json.loads(config).items() if key != "quantization_config"
    }

    def run(data: bytes) -> None:
        (scratch / "config.json").write_bytes(data)
        PlannedFolder.plan(scratch, recipe)

    return Target([json.dumps(plain).encode(), config], run)


def _source(scratch: Path) -> Target:
    folder = scratch / "source"
    make_checkpoint(folder, SHAPES["mini"], 1, shards=2)
    names = ["config.json", "model.safetensors.index.json", "model-00002-of-00002.safetensors"]
    good = {name: (folder / name).read_bytes() for name in names}
    inputs = [good[names[0]], good[names[1]], _header_bytes(folder / names[2])]

    def run(data: bytes) -> None:
        name, content = names[data[0] % 3 if data else 0], data[1:]
        if name == names[2]:
            content = _with_length(content) + good[name][4096:]
        (folder / name).write_bytes(content)
        try:
            Checkpoint(folder).close()
        finally:
            (folder / name).write_bytes(good[name])

    return Target([bytes([i]) + data for i, data in enumerate(inputs)], run, prefix_bytes=1)


def _json(scratch: Path) -> Target:
    return Target(
        _spoiled(scratch, "moe_index.json"),
        lambda data: json.dumps(parse(data, "input"), ensure_ascii=False).encode(),
    )


TARGETS: dict[str, Callable[[Path], Target]] = {
    "index": _verified_file("moe_index.json"),
    "config": _verified_file("config.json"),
    "header": _header,
    "layer-file": _layer_file,
    "rebuild": _rebuild,
    "journal": _journal,
    "recipe": _recipe,
    "rules": _rules,
    "sizes": _sizes,
    "quality": _quality,
    "trace": _trace,
    "plan": _plan,
    "source": _source,
    "json": _json,
}
"""Name -> the target, made in an empty folder of its own."""

_VALUES: list[Any] = [
    0,
    1,
    -1,
    2,
    31,
    32,
    33,
    255,
    256,
    4095,
    4096,
    4097,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
    10**400,
    1.0,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    True,
    False,
    None,
    "",
    "x",
    "0",
    "../x",
    "/etc/passwd",
    "a" * 600,
    "\0",
    "\x1b[31m",
    "\u202e",
    "\ud800",
    "none",
    "zstd",
    "rows-bf16",
    "tile32-q2-g16-s8",
    "U8",
    "BF16",
    "mixtral",
    [],
    {},
    [[]],
    {"": 0},
    [1],
    LAYER_FILE,
    "moe_index.json",
]
_KEYS = ["unknown", "rule.x", "auto_map", "dtype", "attn_implementation", "\x1b]0;x\x07"]


def mutate_json(data: bytes, seed: int) -> bytes | None:
    """JSON `data` with one to three values replaced, removed, added, copied or moved by one; None
    if it is no JSON.
    """
    chosen = random.Random(seed)
    try:
        value = json.loads(data)
    except ValueError:
        return None
    for _ in range(chosen.choice((1, 1, 2, 3))):
        if isinstance(value, dict | list) and value:
            parent, key = chosen.choice(list(_places(value)))
            _edit(chosen, parent, key)
    try:
        return json.dumps(value, separators=chosen.choice((None, (",", ":")))).encode()
    except (UnicodeEncodeError, ValueError):
        return None


def _places(value: Any) -> Any:
    """(parent, key) of every value inside, of long lists the first ones."""
    keys = list(value) if isinstance(value, dict) else range(min(len(value), 12))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def _edit(chosen: random.Random, parent: Any, key: Any) -> None:
    action = chosen.randrange(6)
    if action == 0:
        del parent[key]
    elif action == 1 and type(parent[key]) is int:
        parent[key] += chosen.choice((1, -1, 32, 4096, -4096, 2**32))
    elif action == 2 and isinstance(parent, dict):
        parent[chosen.choice([*parent, *_KEYS])] = chosen.choice(_VALUES)
    elif action == 2:
        parent.insert(key, json.loads(json.dumps(chosen.choice(parent))))
    else:
        parent[key] = json.loads(json.dumps(chosen.choice(_VALUES)))
