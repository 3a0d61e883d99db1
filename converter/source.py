"""A source checkpoint: its config and shards, opened strictly, and its weights by (layer, expert, projection)."""

import hashlib
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converter.names import ExpertTensor, FusedTensor, role
from formats.errors import DamageError, FormatError, SourceError
from formats.index import Architecture
from formats.paths import check_name, locate, open_regular, read_small
from formats.safetensors_header import Header, read_header
from formats.strict_json import parse
from formats.trunk import packable_linears, plain_tensors

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SAMPLES = 64
_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class Weight:
    """A [rows, columns] matrix (or a vector: columns 0) in a shard, from `offset` bytes on."""

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def item_bytes(self) -> int:
        return 4 if self.dtype == "F32" else 2

    @property
    def n_bytes(self) -> int:
        n = self.item_bytes
        for size in self.shape:
            n *= size
        return n


class Checkpoint:
    """A Mixtral checkpoint in a local folder. Close it, or use it as a context.

    Raises SourceError for anything that this release does not convert: no Mixtral, no safetensors, missing, extra,
    misshapen or cut tensors; PathError for unsafe names. Nothing is written and no weight is read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _read_config(folder)
        self.architecture = Architecture.from_config(self.config, str(folder / "config.json"), error=SourceError)
        self._descriptors: dict[str, int] = {}
        self.experts: dict[ExpertTensor, Weight] = {}
        self.trunk: dict[str, Weight] = {}
        try:
            self._headers = self._open_shards()
            self._assign()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    @property
    def shards(self) -> dict[str, int]:
        """Name -> size in bytes, in the order of their names."""
        return {name: os.fstat(d).st_size for name, d in sorted(self._descriptors.items())}

    @property
    def n_bytes(self) -> int:
        """Bytes of all weights that a conversion reads."""
        return sum(w.n_bytes for w in (*self.experts.values(), *self.trunk.values()))

    def read_rows(self, weight: Weight, begin: int, end: int) -> Tensor:
        """Rows begin..end (exclusive) of `weight` in its own dtype, [rows, ...].

        Raises SourceError naming the tensor if its shard has become shorter.
        """
        row_bytes = weight.n_bytes // weight.shape[0]
        data = torch.empty((end - begin) * row_bytes, dtype=torch.uint8)
        view = memoryview(data.numpy())  # type: ignore[arg-type]
        done = 0
        while done < len(view):
            count = os.preadv(self._descriptors[weight.shard], [view[done:]], weight.offset + begin * row_bytes + done)
            if count == 0:
                raise SourceError(
                    f"{self.folder / weight.shard}: cut off inside tensor {weight.name}", "get the shard again"
                )
            done += count
        return data.view(TORCH_DTYPES[weight.dtype]).view(end - begin, *weight.shape[1:])

    def check_finite(self, weight: Weight, begin: int, rows: Tensor) -> None:
        """SourceError naming the tensor and the first place if `rows`, read from row `begin` on, are not finite."""
        bad = ~torch.isfinite(rows)
        if bool(bad.any()):
            first = bad.nonzero()[0].tolist()
            first[0] += begin
            raise SourceError(
                f"{self.folder / weight.shard}: tensor {weight.name} has {int(bad.sum())} NaN or infinite values,"
                f" the first at {first}",
                "the checkpoint is damaged or its training diverged; get it again or choose another one",
            )

    def shard_sha256(self, name: str, stop: threading.Event | None = None) -> str:
        """The sha256 of a whole shard, in hex: what the Hub calls its LFS object id; worthless once `stop` is set."""
        digest = hashlib.sha256()
        position = 0
        while (chunk := os.pread(self._descriptors[name], 4 << 20, position)) and not (stop and stop.is_set()):
            digest.update(chunk)
            position += len(chunk)
        return digest.hexdigest()

    def shard_sample(self, name: str) -> str:
        """A hash of a shard's header, size and samples of its data: cheap, and another model's differs."""
        descriptor = self._descriptors[name]
        size = os.fstat(descriptor).st_size
        digest = hashlib.sha256(f"{size} {self._headers[name].sha256}".encode())
        for i in range(_SAMPLES):
            digest.update(os.pread(descriptor, _SAMPLE_BYTES, size * i // _SAMPLES))
        return digest.hexdigest()

    def _open_shards(self) -> dict[str, Header]:
        headers = {}
        names, weight_map = _shard_names(self.folder)
        for name in names:
            try:
                self._descriptors[name] = open_regular(locate(self.folder, name, str(self.folder)))
                headers[name] = read_header(self._descriptors[name], str(self.folder / name))
            except DamageError as e:
                raise SourceError(e.message, "get the shard again") from None
            except FormatError as e:
                raise SourceError(e.message, e.hint) from None
        for tensor, shard in weight_map.items():
            if tensor not in headers[shard].entries:
                raise SourceError(
                    f"{self.folder / INDEX_NAME}: tensor {tensor} is not in {shard}", "get the checkpoint again"
                )
        return headers

    def _assign(self) -> None:
        """Gives each source tensor its role; every needed one must be there once, with its shape."""
        a = self.architecture
        shapes = plain_tensors(a) | {f"{m}.weight": shape for m, shape in packable_linears(a).items()}
        extra: list[str] = []
        for shard, header in sorted(self._headers.items()):
            for name, entry in header.entries.items():
                what = role(name)
                weight = Weight(name, shard, entry.dtype, entry.shape, header.data_offset + entry.begin)
                if what is None or (what == "lm_head.weight" and a.tie_word_embeddings):
                    continue
                if isinstance(what, FusedTensor):
                    self._assign_fused(what, weight)
                elif isinstance(what, ExpertTensor):
                    rows, columns = a.intermediate_size, a.hidden_size
                    self._put(
                        self.experts, what, weight, (columns, rows) if what.projection == "down" else (rows, columns)
                    )
                elif what in shapes:
                    self._put(self.trunk, what, weight, shapes[what])
                else:
                    extra.append(name)
        experts = {
            ExpertTensor(layer, expert, projection)
            for layer in range(a.num_hidden_layers)
            for expert in range(a.num_local_experts)
            for projection in ("gate", "up", "down")
        }
        if unknown := self.experts.keys() - experts:
            extra += [self.experts[key].name for key in unknown]
        if extra:
            raise SourceError(
                f"{self.folder}: {len(extra)} tensors do not belong to a Mixtral: {', '.join(sorted(extra)[:4])}",
                "merge adapters and remove extra heads first",
            )
        missing = sorted(shapes.keys() - self.trunk.keys())
        missing += [
            f"layer {k.layer} expert {k.expert} {k.projection}" for k in sorted(experts - self.experts.keys(), key=repr)
        ]
        if missing:
            raise SourceError(
                f"{self.folder}: {len(missing)} tensors are missing: {', '.join(missing[:4])}",
                "get the whole checkpoint",
            )

    def _assign_fused(self, what: FusedTensor, weight: Weight) -> None:
        """Cuts a fused tensor into the experts' projections; no byte is read."""
        a = self.architecture
        inner = {"gate_up": (2 * a.intermediate_size, a.hidden_size), "down": (a.hidden_size, a.intermediate_size)}
        shape = (a.num_local_experts, *inner[what.projection])
        self._check(weight, shape)
        rows, columns = inner[what.projection]
        parts = ("gate", "up") if what.projection == "gate_up" else ("down",)
        part_rows = rows // len(parts)
        for expert in range(a.num_local_experts):
            for i, part in enumerate(parts):
                offset = weight.offset + (expert * rows + i * part_rows) * columns * weight.item_bytes
                piece = Weight(weight.name, weight.shard, weight.dtype, (part_rows, columns), offset)
                self._put(self.experts, ExpertTensor(what.layer, expert, part), piece, piece.shape)

    def _put(self, where: dict[Any, Weight], key: Any, weight: Weight, shape: tuple[int, ...]) -> None:
        self._check(weight, shape)
        if key in where:
            raise SourceError(
                f"{self.folder}: tensors {where[key].name} and {weight.name} are the same weight; keep one"
            )
        where[key] = weight

    def _check(self, weight: Weight, shape: tuple[int, ...]) -> None:
        place = f"{self.folder / weight.shard}: tensor {weight.name}"
        if weight.shape != shape:
            raise SourceError(f"{place} has shape {list(weight.shape)}, config.json says {list(shape)}")
        if weight.dtype not in TORCH_DTYPES:
            raise SourceError(
                f"{place} is {weight.dtype}; read are {', '.join(TORCH_DTYPES)}", "use the original checkpoint"
            )


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise SourceError(
            f"{folder} is not a folder", f"if it is a Hub repository, fetch it: hf download {folder} --local-dir model"
        )
    where = str(folder / "config.json")
    try:
        config = parse(read_small(folder, "config.json", str(folder)), where, error=SourceError)
    except DamageError as e:
        raise SourceError(e.message, "name the folder that holds the checkpoint's config.json") from None
    if not isinstance(config, dict):
        raise SourceError(f"{where}: not an object")
    if "auto_map" in config:
        raise SourceError(
            f"{where}: has auto_map: the model needs code of its own, which is never run", "use a plain Mixtral"
        )
    kind, classes = config.get("model_type"), config.get("architectures")
    if kind != "mixtral" or classes not in (None, ["MixtralForCausalLM"]):
        raise SourceError(
            f"{where}: model_type {kind!r}, architectures {classes!r}; read is 'mixtral' with ['MixtralForCausalLM']",
            "use a Mixtral checkpoint (8x7B, 8x22B or a fine-tune of them)",
        )
    if (act := config.get("hidden_act", "silu")) != "silu":
        raise SourceError(f"{where}: hidden_act is {act!r}; supported is 'silu'")
    if "quantization_config" in config:
        raise SourceError(
            f"{where}: is quantized already (quantization_config)", "use the original bf16 or fp16 checkpoint"
        )
    return config


def _shard_names(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The names of the shards, and the weight map (empty where there is only one file)."""
    if (folder / INDEX_NAME).exists():
        where = str(folder / INDEX_NAME)
        index = parse(
            read_small(folder, INDEX_NAME, str(folder), max_bytes=64 << 20),
            where,
            max_bytes=64 << 20,
            error=SourceError,
        )
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise SourceError(f"{where}: field weight_map is not a filled object")
        for tensor, name in weight_map.items():
            if not isinstance(name, str):
                raise SourceError(f"{where}: weight_map[{tensor!r}] is {name!r}, not a file name")
            check_name(name, f"{where}: weight_map[{tensor!r}]")
        return sorted(set(weight_map.values())), weight_map
    if os.path.lexists(folder / SINGLE_NAME):
        return [SINGLE_NAME], {}
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickles:
        raise SourceError(
            f"{folder}: has only pickled weights ({pickles[0]}), which can run code and are never read",
            "use a safetensors version of the model, or save it with safe_serialization in a sandbox",
        )
    raise SourceError(f"{folder}: neither {INDEX_NAME} nor {SINGLE_NAME} is there", "name the folder of the checkpoint")
