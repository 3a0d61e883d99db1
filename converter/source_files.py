"""The small files of a source checkpoint, read strictly: which are copied, and the index of the shards."""

from collections.abc import Collection
from pathlib import Path

from formats.errors import SourceError
from formats.paths import check_name, read_small_source
from formats.strict_json import parse

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def shard_names(folder: Path, there: Collection[str]) -> tuple[list[str], dict[str, str]]:
    """The names of the shards, and the weight map (empty where there is only one file); `there` are all files."""
    if INDEX_NAME in there:
        where = str(folder / INDEX_NAME)
        index = parse(
            read_small_source(folder, INDEX_NAME, str(folder), max_bytes=64 << 20),
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
    if SINGLE_NAME in there:
        return [SINGLE_NAME], {}
    pickles = sorted(name for name in there if name.endswith(_PICKLES))
    if pickles:
        raise SourceError(
            f"{folder}: has only pickled weights ({pickles[0]}), which can run code and are never read",
            "use a safetensors version of the model, or save it with safe_serialization in a sandbox",
        )
    raise SourceError(f"{folder}: neither {INDEX_NAME} nor {SINGLE_NAME} is there", "name the folder of the checkpoint")
