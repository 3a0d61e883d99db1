"""The small files of a source checkpoint, read strictly: config.json and the index of the shards."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from formats.errors import DamageError, SourceError
from formats.paths import check_name, read_small_source
from formats.strict_json import parse

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a Mixtral that this release converts; SourceError for any other."""
    if not folder.is_dir():
        raise SourceError(
            f"{folder} is not a folder", f"if it is a Hub repository, fetch it: hf download {folder} --local-dir model"
        )
    where = str(folder / "config.json")
    try:
        config = parse(read_small_source(folder, "config.json", str(folder)), where, error=SourceError)
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
