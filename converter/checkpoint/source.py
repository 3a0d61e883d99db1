"""A source checkpoint: its config and shards, opened strictly, and its weights by (layer, expert,
projection).
"""

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from converter.checkpoint.config_check import check_with_transformers
from converter.checkpoint.foreign_layouts import foreign_role
from converter.checkpoint.model_shape import ModelShape
from converter.checkpoint.shards.hub_model import HubModel
from converter.checkpoint.shards.hub_shards import HubShards
from converter.checkpoint.shards.shard_index import shard_names
from converter.checkpoint.shards.shard_source import FolderShards, ShardNeed, Shards, cut_off
from converter.checkpoint.shards.source_kinds import INDEX_NAME, check_folder
from converter.checkpoint.source_tensors import (
    HEAD,
    TORCH_DTYPES,
    SourceTensors,
    Weight,
    stored_tensors,
)
from converter.journal.keys import UnitKey
from converter.solver_errors import DAMAGED_HINT
from formats.config.checkpoint_config import read_config
from formats.config.generation_config import read_generation_config
from formats.errors import DamageError, FormatError, MoeConvertError, SourceError
from formats.files.log_once import warn_once
from formats.index import Architecture
from formats.labels import to_label
from formats.safetensors_header import Header, max_header_bytes

_OTHER_HEADER_BYTES = 1 << 20
"""Of a shard's header: metadata of other programs, and tensors that are named in errors."""
_COMPARED_BYTES = 16 << 20
"""How much of two tensors is compared at once, as float32."""


class Checkpoint:
    """A checkpoint in a local folder or a Hub repository. Close it, or use it as a context.

    Raises SourceError for anything that this release does not convert: another model type, no
    safetensors, missing, extra, misshapen or cut tensors; PathError for unsafe names; HubError.
    Nothing is written, and no weight is read but a head that is stored beside an embedding that
    config.json ties it to.
    """

    def __init__(self, source: Path | HubModel) -> None:
        self.hub = source if isinstance(source, HubModel) else None
        self.folder = source.folder if isinstance(source, HubModel) else source
        """Has config.json, tokenizer and the other small files."""
        if self.hub is None:
            check_folder(self.folder)
        where = str(self.folder / "config.json")
        self.config = read_config(self.folder)
        """What transformers may get, and what is written (docs/security.md), with what the tensors
        decide.
        """
        self.shape = ModelShape(self.config, where)
        """What the model is made of, as transformers says it."""
        generation = read_generation_config(
            self.folder, self.config["vocab_size"], error=SourceError
        )
        check_with_transformers(self.shape, self.config, generation, where)
        self._shards: Shards = (
            HubShards(source) if isinstance(source, HubModel) else FolderShards(source)
        )
        self.overlaid: dict[str, str] = {}
        """Of the tensors that are in several shards, the shard that counts."""
        try:
            self._headers, self._weight_map = self._open_shards()
            tensors = SourceTensors(self._shards.where, self.shape)
            tensors.assign(self._weights())
            self.experts, self.trunk = tensors.experts, tensors.trunk
            self._settle_head()
            tensors.check_complete(self.shape)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def architecture(self) -> Architecture:
        """The model's numbers."""
        return self.shape.architecture

    def close(self) -> None:
        self._shards.close()

    @property
    def name(self) -> str:
        """What the source is called, as a label: its folder's name, or owner/model."""
        return self.hub.repo.repo if self.hub else to_label(self.folder.resolve().name)

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

    def expect(self, needs: Iterable[ShardNeed]) -> None:
        """The work that will be done, in order. DoesNotFitError if one piece needs more than may be
        on disk at once.
        """
        self._shards.expect(needs)

    def done(self, key: UnitKey) -> None:
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
        if self._shards.read_into(weight.shard, weight.offset + begin * row_bytes, view) < len(
            view
        ):
            raise cut_off(self._shards.where, weight.shard, weight.name)
        return data.view(TORCH_DTYPES[weight.dtype]).view(end - begin, *weight.shape[1:])

    def place_of(self, weight: Weight) -> str:
        """The file and the name of `weight`, for messages."""
        return f"{self._shards.where}/{weight.shard}: tensor {weight.name}"

    def check_finite(self, weight: Weight, begin: int, rows: Tensor) -> None:
        """SourceError naming the tensor and the first place if `rows`, read from row `begin` on,
        are not finite.
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
        """`error` of a matrix's `rows`, read from row `begin` on, with file, tensor and the largest
        weight's place.
        """
        magnitude = rows.float().abs()
        row, column = divmod(int(magnitude.argmax()), rows.shape[1])
        return SourceError(
            f"{self.place_of(weight)}: {error.message}; the largest of its weights is"
            f" {float(rows[row, column]):g} at {weight.place(begin + row, column)}",
            error.hint,
        )

    def shard_sha256(self, name: str, stop: threading.Event | None = None) -> str:
        """The sha256 of a whole shard, in hex: what the Hub calls its LFS object id; worthless once
        `stop` is set.
        """
        return self._shards.sha256(name, stop)

    def shard_sample(self, name: str) -> str:
        """What another model's shard of that name does not have; cheap."""
        return self._shards.identity(name, self._headers[name])

    def layer_of(self, name: str) -> int | None:
        """The decoder layer of a tensor or module of the trunk: the first for the embeddings; None
        for what comes after the layers.
        """
        return 0 if name == self.shape.embedding else self.shape.decoder_layer(name)

    def _open_shards(self) -> tuple[dict[str, Header], dict[str, str]]:
        """(name -> header of each shard, the index's weight map)."""
        headers = {}
        there = self.hub.repo.files if self.hub else [p.name for p in self.folder.iterdir()]
        names, weight_map = shard_names(self.folder, there)
        n_tensors = stored_tensors(self.shape)
        if len(names) > n_tensors:
            raise SourceError(
                f"{self.folder / INDEX_NAME}: {len(names)} shards, of a model with {n_tensors} tensors",
                "get index and config.json of the same checkpoint",
            )
        for name in names:
            try:
                self._shards.open(name)
                headers[name] = self._shards.header(
                    name, max_header_bytes(n_tensors, _OTHER_HEADER_BYTES)
                )
            except DamageError as e:
                raise SourceError(e.message, "get the shard again") from None
            except FormatError as e:
                raise SourceError(e.message, e.hint) from None
        stored = {tensor for header in headers.values() for tensor in header.entries}
        for tensor, shard in weight_map.items():
            # A head that is missing is the business of tie_word_embeddings.
            if tensor not in stored and foreign_role(tensor, self.shape) not in (None, HEAD):
                raise SourceError(
                    f"{self.folder / INDEX_NAME}: tensor {tensor} is not in {shard}",
                    "get the checkpoint again",
                )
        return headers, weight_map

    def _weights(self) -> Iterator[Weight]:
        """Every stored tensor once. Of copies in several shards, the one that the index names
        counts.
        """
        shards: dict[str, list[str]] = {}
        for shard, header in sorted(self._headers.items()):
            for name in header.entries:
                shards.setdefault(name, []).append(shard)
        for name, places in shards.items():
            if len(places) > 1:
                named = self._weight_map.get(name)
                if named not in places:
                    raise SourceError(
                        f"{self._shards.where}: tensor {name} is in {' and in '.join(places)}, and {INDEX_NAME} does"
                        " not say which counts",
                        f"name the right shard in the weight_map of {INDEX_NAME}, or remove the other copy",
                    )
                self.overlaid[name] = named
            shard = self.overlaid.get(name, places[0])
            header = self._headers[shard]
            entry = header.entries[name]
            yield Weight(name, shard, entry.dtype, entry.shape, header.data_offset + entry.begin)
        if self.overlaid:
            first, shard = next(iter(self.overlaid.items()))
            warn_once(
                f"{self._shards.where}: {len(self.overlaid)} tensors are in several shards; the copy that {INDEX_NAME}"
                f" names counts: {first} in {shard}"
            )

    def _settle_head(self) -> None:
        """Decides by the tensors, as transformers does, whether the head is the embedding; config
        follows.
        """
        name = self.shape.embedding
        head, embedding = self.trunk.get(HEAD), self.trunk.get(name)
        if not self.architecture.tie_word_embeddings or head is None:
            return
        if embedding is None:
            warn_once(
                f"{self._shards.where}: {name} is not stored; {HEAD} is both, since they are tied"
            )
            self.trunk[name] = self.trunk.pop(HEAD)
        elif self._equal(head, embedding):
            del self.trunk[HEAD]
        else:
            warn_once(
                f"{self._shards.where}: tie_word_embeddings in config.json is true, but {HEAD} in {head.shard} differs"
                f" from {name} in {embedding.shard}: both are kept, not tied, as transformers does"
            )
            self.config = {**self.config, "tie_word_embeddings": False}
            self.shape = ModelShape(self.config, str(self.folder / "config.json"))

    def _equal(self, one: Weight, other: Weight) -> bool:
        """Whether two matrices of the same shape have the same values."""
        step = max(1, _COMPARED_BYTES // (4 * one.shape[1]))
        for begin in range(0, one.shape[0], step):
            rows = [
                self.read_rows(w, begin, min(begin + step, w.shape[0])).float()
                for w in (one, other)
            ]
            if not torch.equal(*rows):
                return False
        return True
