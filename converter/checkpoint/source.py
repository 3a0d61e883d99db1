"""A source checkpoint: its config and shards, opened strictly, and reads of its weights."""

import threading
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from converter.checkpoint.adapters.adapter_folder import AdapterFolder
from converter.checkpoint.adapters.changes import MERGED_AT_ONCE, MIN_ROWS, Change
from converter.checkpoint.config_check import check_with_transformers
from converter.checkpoint.merged_weights import MergedWeights
from converter.checkpoint.model_shape import ModelShape
from converter.checkpoint.shards.hub_model import HubModel
from converter.checkpoint.shards.hub_shards import HubShards
from converter.checkpoint.shards.shard_source import FolderShards, ShardNeed, Shards, cut_off
from converter.checkpoint.shards.source_kinds import check_folder
from converter.checkpoint.source_tensors import HEAD_WEIGHT, SourceTensors
from converter.checkpoint.stored_weights import StoredWeights
from converter.checkpoint.weight import TORCH_DTYPES, Weight
from converter.journal.keys import UnitKey
from converter.solver_errors import DAMAGED_HINT
from formats.config.checkpoint_config import read_config
from formats.config.generation_config import read_generation_config
from formats.errors import MoeConvertError, SourceError
from formats.files.log_once import warn_once
from formats.index import Architecture
from formats.labels import to_label

_COMPARED_BYTES = 16 << 20
"""Slice of two tensors that is compared at once, in float32."""


class Checkpoint:
    """A checkpoint in a local folder or a Hub repository. Close it, or use it as a context.

    adapters: merged in this order into the weights that `read_rows` returns. Raises SourceError for
    anything that this release does not convert: another model type, no safetensors, missing,
    surplus, misshapen or cut tensors, an adapter that does not fit; PathError for unsafe names;
    HubError; DoesNotFitError for adapters larger than the memory. Nothing is written. No weight of
    the checkpoint is read, with one exception: a stored head that config.json ties to the embedding
    is compared with it.
    """

    def __init__(self, source: Path | HubModel, adapters: Sequence[AdapterFolder] = ()) -> None:
        self.hub = source if isinstance(source, HubModel) else None
        self.folder = source.folder if isinstance(source, HubModel) else source
        """Has config.json, tokenizer and the other small files."""
        if self.hub is None:
            check_folder(self.folder)
        where = str(self.folder / "config.json")
        self.config = read_config(self.folder)
        """The fields that transformers may get (docs/security.md) and the conversion writes. The
        stored tensors decide tie_word_embeddings.
        """
        self.shape = ModelShape(self.config, where)
        generation = read_generation_config(
            self.folder, self.config["vocab_size"], error=SourceError
        )
        check_with_transformers(self.shape, self.config, generation, where)
        self._shards: Shards = (
            HubShards(source) if isinstance(source, HubModel) else FolderShards(source)
        )
        try:
            listed = self.hub.repo.files if self.hub else [p.name for p in self.folder.iterdir()]
            stored = StoredWeights.open(self._shards, self.folder, listed, self.shape)
            self._headers = stored.headers
            self.overlaid = stored.overlaid
            """Tensor that several shards store -> shard that counts."""
            tensors = SourceTensors(self._shards.where, self.shape)
            tensors.assign(stored.weights)
            self.experts = tensors.experts
            self.trunk = tensors.trunk
            self._settle_head()
            tensors.check_complete(self.shape)
            self.adapters = tuple(adapters)
            """The adapters in the order of their merges."""
            self._merged = MergedWeights(
                self.adapters, self.name, self.shape, self.trunk, self.experts
            )
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def architecture(self) -> Architecture:
        """The model's sizes and counts."""
        return self.shape.architecture

    def close(self) -> None:
        self._shards.close()

    @property
    def name(self) -> str:
        """The source's label: the name of its folder, or owner/model."""
        return self.hub.repo.repo if self.hub else to_label(self.folder.resolve().name)

    @property
    def revision(self) -> str | None:
        """The commit of a Hub repository; None for a local folder."""
        return self.hub.repo.commit if self.hub else None

    @property
    def stop(self) -> threading.Event:
        """Once set, reads that would have to wait raise Stopped."""
        return self._shards.stop

    @property
    def shards(self) -> dict[str, int]:
        """Shard name -> size in bytes, by name."""
        return {name: self._shards.size(name) for name in sorted(self._headers)}

    @property
    def fetch_bytes(self) -> int:
        """Upper bound of the disk that fetched shards take during a conversion."""
        return self._shards.disk_bytes() if isinstance(self._shards, HubShards) else 0

    def fetch_into(self, folder: Path) -> None:
        """Keep the shards of a Hub repository in `folder` from now on, while they are needed."""
        if isinstance(self._shards, HubShards):
            self._shards.fetch_into(folder)

    def expect(self, needs: Iterable[ShardNeed]) -> None:
        """Announce the work to come, in order.

        DoesNotFitError if one unit of work needs more shards than may be on disk at once.
        """
        self._shards.expect(needs)

    def done(self, key: UnitKey) -> None:
        """Report that an expected unit of work is done."""
        self._shards.done(key)

    @property
    def expert_dtypes(self) -> set[str]:
        """The dtypes of the stored experts, by safetensors' names."""
        return {weight.dtype for weight in self.experts.values()}

    @property
    def n_bytes(self) -> int:
        """Bytes of all weights that a conversion reads."""
        return sum(w.n_bytes for w in (*self.experts.values(), *self.trunk.values()))

    @property
    def adapter_bytes(self) -> int:
        """Memory of the adapters' tensors."""
        return self._merged.n_bytes

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of tokenizer and chat templates: the last adapter's that has a vocabulary."""
        for adapter in reversed(self.adapters):
            if adapter.tokenizer_files:
                return adapter.folder
        return self.folder

    def read_rows(self, weight: Weight, begin: int, end: int) -> Tensor:
        """Return rows begin..end (exclusive) of `weight` with its adapters merged, [rows, ...].

        They have the stored dtype. SourceError with the tensor's name if the shard has become
        shorter.
        """
        changes = self._merged.of_weight(weight)
        if not changes:
            return self._read_stored(weight, begin, end)
        step = max(MIN_ROWS, MERGED_AT_ONCE // prod(weight.shape[1:]))
        parts = (
            self._merged_rows(weight, changes, row, min(row + step, end))
            for row in range(begin, end, step)
        )
        if end - begin <= step:
            return next(parts)
        merged = torch.empty(end - begin, *weight.shape[1:], dtype=TORCH_DTYPES[weight.dtype])
        for part, rows in zip(merged.split(step), parts, strict=True):
            part.copy_(rows)
        return merged

    def _merged_rows(
        self, weight: Weight, changes: Sequence[Change], begin: int, end: int
    ) -> Tensor:
        first = max(0, min(begin, end - MIN_ROWS))
        last = min(weight.shape[0], max(end, first + MIN_ROWS))
        rows = self._read_stored(weight, first, last)
        for change in changes:
            rows = change.apply(rows, first)
        return rows[begin - first : end - first]

    def _read_stored(self, weight: Weight, begin: int, end: int) -> Tensor:
        """Return rows begin..end (exclusive) of `weight` as the shard has them."""
        row_bytes = weight.n_bytes // weight.shape[0]
        data = torch.empty((end - begin) * row_bytes, dtype=torch.uint8)
        view = memoryview(data.numpy())  # type: ignore[arg-type]
        offset = weight.offset + begin * row_bytes
        if self._shards.read_into(weight.shard, offset, view) < len(view):
            raise cut_off(self._shards.where, weight.shard, weight.name)
        return data.view(TORCH_DTYPES[weight.dtype]).view(end - begin, *weight.shape[1:])

    def place_of(self, weight: Weight) -> str:
        """Return the weight's file and tensor name, for messages."""
        merged = " with its adapters" if self._merged.of_weight(weight) else ""
        return f"{self._shards.where}/{weight.shard}: tensor {weight.name}{merged}"

    def check_finite(self, weight: Weight, begin: int, rows: Tensor) -> None:
        """Raise SourceError with tensor and position if `rows` have infinite or NaN values.

        begin: the first of these rows in `weight`.
        """
        bad = ~torch.isfinite(rows)
        if bool(bad.any()):
            row, *rest = bad.nonzero()[0].tolist()
            raise SourceError(
                f"{self.place_of(weight)} has {int(bad.sum())} NaN or infinite"
                f" values, the first at {weight.place(begin + row, *rest)}",
                DAMAGED_HINT,
            )

    def too_large(
        self, weight: Weight, begin: int, rows: Tensor, error: MoeConvertError
    ) -> SourceError:
        """Return a solver's `error` with file, tensor and the position of the largest weight.

        rows: the rows that the solver got, [n, columns]. begin: the first of them in `weight`.
        """
        magnitude = rows.float().abs()
        row, column = divmod(int(magnitude.argmax()), rows.shape[1])
        return SourceError(
            f"{self.place_of(weight)}: {error.message}; the largest of its weights is"
            f" {float(rows[row, column]):g} at {weight.place(begin + row, column)}",
            error.hint,
        )

    def shard_sha256(self, name: str, stop: threading.Event | None = None) -> str:
        """Return the sha256 of a whole shard in hex, the Hub's LFS object id.

        The result is worthless once `stop` is set.
        """
        return self._shards.sha256(name, stop)

    def shard_sample(self, name: str) -> str:
        """Return a cheap text that differs for the same shard of another model."""
        return self._shards.identity(name, self._headers[name])

    def layer_of(self, name: str) -> int | None:
        """Return the decoder layer with which a tensor or module of the trunk is converted.

        The embeddings come with layer 0; None for everything after the last layer.
        """
        return 0 if name == self.shape.embedding else self.shape.decoder_layer(name)

    def _settle_head(self) -> None:
        """Decide by the stored tensors, as transformers does, whether the head is the embedding.

        config and shape follow.
        """
        name = self.shape.embedding
        head = self.trunk.get(HEAD_WEIGHT)
        embedding = self.trunk.get(name)
        if not self.architecture.tie_word_embeddings or head is None:
            return
        where = self._shards.where
        if embedding is None:
            warn_once(
                f"{where}: {name} is not stored; {HEAD_WEIGHT} is used for both, since config.json"
                " says that they are tied"
            )
            self.trunk[name] = self.trunk.pop(HEAD_WEIGHT)
        elif self._equal(head, embedding):
            del self.trunk[HEAD_WEIGHT]
        else:
            warn_once(
                f"{where}: tie_word_embeddings in config.json is true, but {HEAD_WEIGHT} in"
                f" {head.shard} differs from {name} in {embedding.shard}: both are kept, not tied,"
                " as in transformers"
            )
            self.config = {**self.config, "tie_word_embeddings": False}
            self.shape = ModelShape(self.config, str(self.folder / "config.json"))

    def _equal(self, one: Weight, other: Weight) -> bool:
        """True if two matrices of the same shape have the same values."""
        step = max(1, _COMPARED_BYTES // (4 * one.shape[1]))
        for begin in range(0, one.shape[0], step):
            end = min(begin + step, one.shape[0])
            one_rows = self._read_stored(one, begin, end).float()
            other_rows = self._read_stored(other, begin, end).float()
            if not torch.equal(one_rows, other_rows):
                return False
        return True
