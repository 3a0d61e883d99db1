"""The names of a checkpoint's shards, and their index, read strictly."""

from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path

from converter.checkpoint.shards.source_kinds import SHARD_INDEX_NAME, SINGLE_NAME
from formats.config.strict_json import parse
from formats.errors import SourceError
from formats.files.log_once import warn_once
from formats.files.paths import check_name, read_small_source

MAX_INDEX_BYTES = 64 << 20


def shard_names(folder: Path, listed: Collection[str]) -> tuple[list[str], dict[str, str]]:
    """Return the shards' names and the weight map, which is empty for a single shard.

    The choice is transformers': model.safetensors if it exists, else the shards of the index.
    Warns of other weights. listed: all file names of the checkpoint.
    """
    weight_map: dict[str, str] = {}
    if SINGLE_NAME in listed:
        names = [SINGLE_NAME]
        read = f"the weights in {SINGLE_NAME}"
    elif SHARD_INDEX_NAME in listed:
        weight_map = _read_weight_map(folder)
        names = sorted(set(weight_map.values()))
        read = f"the shards that {SHARD_INDEX_NAME} names"
    else:
        raise SourceError(
            f"{folder}: neither {SHARD_INDEX_NAME} nor {SINGLE_NAME} is there",
            "name the folder of the checkpoint",
        )
    used = {*names, SHARD_INDEX_NAME} if weight_map else set(names)
    others = sorted({name for name in listed if _is_weights(name)} - used)
    if others:
        warn_once(f"{folder}: {read} count, as in transformers; not read: {', '.join(others)}")
    return names, weight_map


def _is_weights(name: str) -> bool:
    return fnmatch(name, "model*.safetensors") or fnmatch(name, "model*.index.json")


def _read_weight_map(folder: Path) -> dict[str, str]:
    where = str(folder / SHARD_INDEX_NAME)
    data = read_small_source(folder, SHARD_INDEX_NAME, str(folder), max_bytes=MAX_INDEX_BYTES)
    index = parse(data, where, max_bytes=MAX_INDEX_BYTES, error=SourceError)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(
            f"{where}: field weight_map must be an object with entries", "get the index again"
        )
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise SourceError(
                f"{where}: weight_map[{tensor!r}] is {name!r}, not a file name",
                "get the index again",
            )
        check_name(name, f"{where}: weight_map[{tensor!r}]")
    return weight_map
