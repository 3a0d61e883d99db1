"""A source checkpoint: its config and shards, opened strictly, and its weights by (layer, expert, projection)."""

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converter.config_check import check_with_transformers
from converter.hub_model import HubModel
from converter.hub_shards import HubShards
from converter.names import ExpertTensor, FusedTensor, role
from converter.shards import FolderShards, Shards, cut_off
from converter.solver import DAMAGED_HINT
from converter.source_files import INDEX_NAME, shard_names
from formats.checkpoint_config import read_config
from formats.errors import DamageError, FormatError, SourceError
from formats.generation_config import read_generation_config
from formats.index import Architecture
from formats.safetensors_header import Header
from formats.trunk import packable_linears, plain_tensors

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


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
    """A Mixtral checkpoint in a local folder or a Hub repository. Close it, or use it as a context.

    Raises SourceError for anything that this release does not convert: no Mixtral, no safetensors, missing, extra,
    misshapen or cut tensors; PathError for unsafe names; HubError. Nothing is written and no weight is read.
    """

    def __init__(self, source: Path | HubModel) -> None:
        self.hub = source if isinstance(source, HubModel) else None
        self.folder = source.folder if isinstance(source, HubModel) else source
        """Has config.json, tokenizer and the other small files."""
        where = str(self.folder / "config.json")
        self.config = read_config(self.folder)
        """What transformers may get, and what is written: docs/security.md."""
        self.architecture = Architecture.from_config(self.config, where, error=SourceError)
        generation = read_generation_config(self.folder, self.architecture.vocab_size, error=SourceError)
        check_with_transformers(self.config, generation, where)
        self._shards: Shards = HubShards(source) if isinstance(source, HubModel) else FolderShards(source)
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
        self._shards.close()

    @property
    def name(self) -> str:
        """What the source is called: its folder's name, or owner/model."""
        return self.hub.repo.repo if self.hub else self.folder.resolve().name

    @property
    def revision(self) -> str | None:
        """The commit that it is pinned to, if it is in a Hub repository."""
        return self.hub.repo.commit if self.hub else None

    @property
    def stop(self) -> threading.Event:
        """Once set, reads that would have to wait raise Stopped."""
        return self._shards.stop

    @property
    def shards(self) -> dict[str, int]:
        """Name -> size in bytes, in the order of their names."""
        return {name: self._shards.size(name) for name in sorted(self._headers)}

    @property
    def fetch_bytes(self) -> int:
        """How much disk shards may take that are fetched for a conversion."""
        return self._shards.disk_bytes() if isinstance(self._shards, HubShards) else 0

    def fetch_into(self, folder: Path) -> None:
        """Shards of a Hub repository are kept in `folder` from here on, while they are needed."""
        if isinstance(self._shards, HubShards):
            self._shards.fetch_into(folder)

    def expect(self, keys: Iterable[tuple[Any, ...]], *, by_layer: bool) -> None:
        """The work that will be done, in order: ("expert", layer, expert), ("linear", module), ("tensor", name).

        by_layer: whether each piece of work in a layer may read all of that layer, as calibration does.
        DoesNotFitError if that is more than may be on disk at once.
        """
        needs = [(key, self._shards_of(key)) for key in keys]
        if by_layer:
            layers: dict[int | None, frozenset[str]] = {}
            for key, names in needs:
                layers[layer_of(key)] = layers.get(layer_of(key), frozenset()) | names
            needs = [(key, names if layer_of(key) is None else layers[layer_of(key)]) for key, names in needs]
        self._shards.expect(needs)

    def done(self, key: tuple[Any, ...]) -> None:
        """A piece of work that was expected is done."""
        self._shards.done(key)

    @property
    def expert_dtypes(self) -> set[str]:
        """In what the experts are stored, as safetensors calls it."""
        return {weight.dtype for weight in self.experts.values()}

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
        if self._shards.read_into(weight.shard, weight.offset + begin * row_bytes, view) < len(view):
            raise cut_off(self._shards.where, weight.shard, weight.name)
        return data.view(TORCH_DTYPES[weight.dtype]).view(end - begin, *weight.shape[1:])

    def place_of(self, weight: Weight) -> str:
        """The file and the name of `weight`, for messages."""
        return f"{self._shards.where}/{weight.shard}: tensor {weight.name}"

    def check_finite(self, weight: Weight, begin: int, rows: Tensor) -> None:
        """SourceError naming the tensor and the first place if `rows`, read from row `begin` on, are not finite."""
        bad = ~torch.isfinite(rows)
        if bool(bad.any()):
            first = bad.nonzero()[0].tolist()
            first[0] += begin
            raise SourceError(
                f"{self.place_of(weight)} has {int(bad.sum())} NaN or infinite values, the first at {first}",
                DAMAGED_HINT,
            )

    def shard_sha256(self, name: str, stop: threading.Event | None = None) -> str:
        """The sha256 of a whole shard, in hex: what the Hub calls its LFS object id; worthless once `stop` is set."""
        return self._shards.sha256(name, stop)

    def shard_sample(self, name: str) -> str:
        """What another model's shard of that name does not have; cheap."""
        return self._shards.identity(name, self._headers[name])

    def place(self, key: tuple[Any, ...]) -> tuple[str, int]:
        """Where the last tensor begins that a piece of work reads: work in this order needs few shards at once."""
        return max((weight.shard, weight.offset) for weight in self._weights_of(key))

    def _shards_of(self, key: tuple[Any, ...]) -> frozenset[str]:
        """The shards that a piece of work reads."""
        return frozenset(weight.shard for weight in self._weights_of(key))

    def _weights_of(self, key: tuple[Any, ...]) -> list[Weight]:
        if key[0] == "expert":
            return [self.experts[ExpertTensor(key[1], key[2], projection)] for projection in ("gate", "up", "down")]
        return [self.trunk[f"{key[1]}.weight" if key[0] == "linear" else key[1]]]

    def _open_shards(self) -> dict[str, Header]:
        headers = {}
        there = self.hub.repo.files if self.hub else [p.name for p in self.folder.iterdir()]
        names, weight_map = shard_names(self.folder, there)
        for name in names:
            try:
                self._shards.open(name)
                headers[name] = self._shards.header(name)
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
        place = f"{self._shards.where}/{weight.shard}: tensor {weight.name}"
        if weight.shape != shape:
            raise SourceError(f"{place} has shape {list(weight.shape)}, config.json says {list(shape)}")
        if weight.dtype not in TORCH_DTYPES:
            raise SourceError(
                f"{place} is {weight.dtype}; read are {', '.join(TORCH_DTYPES)}", "use the original checkpoint"
            )


def layer_of(key: tuple[Any, ...]) -> int | None:
    """The layer that a piece of work is done with: the first for embeddings; None for the last norm and the head."""
    if key[0] == "expert":
        return int(key[1])
    if key[1] == "model.embed_tokens.weight":
        return 0
    parts = str(key[1]).split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else None
