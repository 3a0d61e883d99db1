"""All tensors that a checkpoint's shards store, each once, from the shards' headers."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from converter.checkpoint.foreign_layouts import foreign_role
from converter.checkpoint.model_shape import ModelShape
from converter.checkpoint.shards.shard_index import shard_names
from converter.checkpoint.shards.shard_source import Shards
from converter.checkpoint.shards.source_kinds import SHARD_INDEX_NAME
from converter.checkpoint.source_tensors import HEAD_WEIGHT, stored_tensors
from converter.checkpoint.weight import Weight
from formats.errors import DamageError, FormatError, SourceError
from formats.files.log_once import warn_once
from formats.safetensors_header import Header, max_header_bytes

_OTHER_HEADER_BYTES = 1 << 20
"""Allowed in a shard's header beside the model's tensors: metadata and surplus tensors, which an
error then names.
"""


@dataclass(frozen=True)
class StoredWeights:
    """The shards' headers, and the tensors that count.

    headers: shard -> header. overlaid: tensor that several shards store -> shard that counts.
    """

    headers: dict[str, Header]
    weights: list[Weight]
    overlaid: dict[str, str]

    @classmethod
    def open(
        cls, shards: Shards, folder: Path, listed: Collection[str], shape: ModelShape
    ) -> "StoredWeights":
        """Open all shards and read their headers.

        folder: has the index of the shards. listed: all file names of the checkpoint. SourceError
        for a missing or damaged shard, and for a tensor that the index names and no shard stores.
        """
        names, weight_map = shard_names(folder, listed)
        n_tensors = stored_tensors(shape)
        if len(names) > n_tensors:
            raise SourceError(
                f"{folder / SHARD_INDEX_NAME}: {len(names)} shards, of a model with {n_tensors}"
                " tensors",
                "get index and config.json of the same checkpoint",
            )
        max_bytes = max_header_bytes(n_tensors, _OTHER_HEADER_BYTES)
        headers = {name: _open_shard(shards, name, max_bytes) for name in names}
        _check_weight_map(folder / SHARD_INDEX_NAME, weight_map, headers, shape)
        overlaid = _overlaid(shards.where, weight_map, headers)
        return cls(headers, list(_weights(headers, overlaid)), overlaid)


def _open_shard(shards: Shards, name: str, max_header_bytes: int) -> Header:
    try:
        shards.open(name)
        return shards.header(name, max_header_bytes)
    except DamageError as e:
        raise SourceError(e.message, "get the shard again") from None
    except FormatError as e:
        raise SourceError(e.message, e.hint) from None


def _check_weight_map(
    path: Path, weight_map: dict[str, str], headers: dict[str, Header], shape: ModelShape
) -> None:
    stored = {tensor for header in headers.values() for tensor in header.entries}
    for tensor, shard in weight_map.items():
        # SourceTensors judges a missing head, by tie_word_embeddings.
        if tensor not in stored and foreign_role(tensor, shape) not in (None, HEAD_WEIGHT):
            raise SourceError(
                f"{path}: tensor {tensor} is not in {shard}", "get the checkpoint again"
            )


def _overlaid(where: str, weight_map: dict[str, str], headers: dict[str, Header]) -> dict[str, str]:
    """Return tensor -> shard that counts, by the index, for tensors in several shards."""
    places: dict[str, list[str]] = {}
    for shard, header in sorted(headers.items()):
        for tensor in header.entries:
            places.setdefault(tensor, []).append(shard)
    overlaid: dict[str, str] = {}
    for tensor, shards in places.items():
        if len(shards) == 1:
            continue
        named = weight_map.get(tensor)
        if named not in shards:
            raise SourceError(
                f"{where}: tensor {tensor} is in {' and in '.join(shards)}, and"
                f" {SHARD_INDEX_NAME} does not name the one that counts",
                f"name the right shard in the weight_map of {SHARD_INDEX_NAME}, or remove the"
                " other copy",
            )
        overlaid[tensor] = named
    if overlaid:
        first, shard = next(iter(overlaid.items()))
        warn_once(
            f"{where}: {len(overlaid)} tensors are in several shards; the copy that"
            f" {SHARD_INDEX_NAME} names counts: {first} in {shard}"
        )
    return overlaid


def _weights(headers: dict[str, Header], overlaid: dict[str, str]) -> Iterator[Weight]:
    for shard, header in sorted(headers.items()):
        for name, entry in header.entries.items():
            if overlaid.get(name, shard) == shard:
                offset = header.data_offset + entry.begin
                yield Weight(name, shard, entry.dtype, entry.shape, offset)
