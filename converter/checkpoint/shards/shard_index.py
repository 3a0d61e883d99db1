"""The small files of a source checkpoint, read strictly: which are copied, and the index of the
shards.
"""

from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path

from converter.checkpoint.shards.source_kinds import INDEX_NAME, SINGLE_NAME
from formats.config.strict_json import parse
from formats.errors import SourceError
from formats.files.log_once import warn_once
from formats.files.paths import check_name, read_small_source


def shard_names(folder: Path, there: Collection[str]) -> tuple[list[str], dict[str, str]]:
    """The names of the shards, and the weight map (empty where there is only one file); `there` are
    all files.

    As transformers chooses: model.safetensors where there is one, else what the index names.
    """
    if SINGLE_NAME in there:
        names, weight_map = [SINGLE_NAME], dict[str, str]()
    elif INDEX_NAME in there:
        weight_map = _read_weight_map(folder)
        names = sorted(set(weight_map.values()))
    else:
        raise SourceError(
            f"{folder}: neither {INDEX_NAME} nor {SINGLE_NAME} is there",
            "name the folder of the checkpoint",
        )
    others = {
        name
        for name in there
        if fnmatch(name, "model*.safetensors") or fnmatch(name, "model*.index.json")
    }
    if others := others - {*names, *([INDEX_NAME] if weight_map else [])}:
        read = (
            f"the shards that {INDEX_NAME} names" if weight_map else f"the weights in {SINGLE_NAME}"
        )
        warn_once(
            f"{folder}: {read} count, as in transformers; not read: {', '.join(sorted(others))}"
        )
    return names, weight_map


def _read_weight_map(folder: Path) -> dict[str, str]:
    where = str(folder / INDEX_NAME)
    index = parse(
        read_small_source(folder, INDEX_NAME, str(folder), max_bytes=64 << 20),
        where,
        max_bytes=64 << 20,
        error=SourceError,
    )
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(
            f"{where}: field weight_map is not a filled object", "get the index again"
        )
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise SourceError(
                f"{where}: weight_map[{tensor!r}] is {name!r}, not a file name",
                "get the index again",
            )
        check_name(name, f"{where}: weight_map[{tensor!r}]")
    return weight_map
