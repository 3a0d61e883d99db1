"""What the keyword arguments of transformers' from_pretrained mean for a converted model."""

import inspect
import os
from typing import Any

from formats.config.field_rules import short
from formats.config.recorded_config import METHOD
from formats.errors import RecipeError
from formats.hub.repo import is_offline
from loader.hf.by_name.device_map import device_of_map
from loader.hf.private_names import attention_implementation, experts_implementation
from loader.model import from_pretrained

NO_EFFECT = frozenset({
    "_from_auto", "_from_pipeline", "_fast_init", "adapter_kwargs", "code_revision", "low_cpu_mem_usage", "mirror",
    "offload_buffers", "offload_folder", "offload_state_dict", "tqdm_class", "trust_remote_code", "weights_only",
})  # fmt: skip
"""Arguments that are taken whatever they say: nothing is offloaded, no pickle is read, and no code
from the folder is run. An adapter beside the weights is not used, and the log says so.
"""

ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "adapter_name": (("default",), "load adapters by peft"),
    "allow_all_kernels": ((False, None), ""),
    "cache_dir": ((None,), "set HF_HUB_CACHE, or name the folder in the cache"),
    "device_mesh": ((None,), ""),
    "disable_mmap": ((None, False), "give io='direct': experts are then read past the page cache"),
    "distributed_config": ((None,), ""),
    "experts_implementation": ((None,), "give kernels= for the loader's own"),
    "force_download": ((False, None), "remove the repository from the Hub's cache"),
    "from_flax": ((False, None), ""),
    "from_tf": ((False, None), ""),
    "fusion_config": ((None,), ""),
    "gguf_file": ((None,), ""),
    "ignore_mismatched_sizes": ((False, None), ""),
    "kernel_config": ((None,), ""),
    "key_mapping": ((None,), ""),
    "max_memory": ((None,), "give gpu_cache= and ram_cache=: what experts may take on each GPU, and in RAM"),
    "output_loading_info": ((False, None), ""),
    "proxies": ((None,), "set HTTPS_PROXY"),
    "state_dict": ((None,), ""),
    "subfolder": (("", None), "name the folder itself"),
    "tp_plan": ((None,), "give device='cuda:0,cuda:1': several GPUs then hold experts of different layers"),
    "tp_size": ((None, 1), "give device='cuda:0,cuda:1': several GPUs then hold experts of different layers"),
    "use_kernels": ((False, None), "give kernels= for the loader's own"),
    "use_safetensors": ((None, True), "converted folders have nothing else"),
    "variant": ((None,), ""),
}  # fmt: skip
"""Argument -> (the values with which it changes nothing, the next step for others)."""

_OPTIONS = tuple(name for name in inspect.signature(from_pretrained).parameters if name != "folder")


def loader_options(name: str, given: Any, there: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the options of loader.from_pretrained for transformers' keyword arguments.

    given, there: the configuration that the caller gave, in which transformers puts some of the
    arguments, and the one at `name`. RecipeError naming an argument that is not supported.
    """
    left = {key: value for key, value in arguments.items() if key not in NO_EFFECT}
    for argument, (neutral, hint) in ONLY.items():
        value = left.pop(argument, None)
        if value is not None and value not in neutral:
            raise RecipeError(
                f"{argument}: {short(value)} is not supported for a converted model", hint
            )
    _check_quantization(left.pop("quantization_config", None))
    options = {
        **_device(left),
        **_dtype(left, given, there),
        **_attention(left, given, there),
        **_repository(name, left, given),
    }
    if unknown := sorted(left.keys() - set(_OPTIONS)):
        raise RecipeError(
            f"{unknown[0]}: unknown argument for a converted model",
            f"known are {', '.join(_OPTIONS)} and device_map",
        )
    return {**left, **options}


def _check_quantization(value: Any) -> None:
    method = (
        value.get("quant_method")
        if isinstance(value, dict)
        else getattr(value, "quant_method", None)
    )
    if value is not None and method != METHOD:
        name = short(getattr(method, "value", method))
        raise RecipeError(
            f"quantization_config: {name} is given for a model that is converted already",
            "leave it out, or convert again with other --bits",
        )


def _device(left: dict[str, Any]) -> dict[str, Any]:
    device_map = left.pop("device_map", None)
    if device_map is None:
        return {}
    if left.get("device") is not None:
        raise RecipeError("device, device_map: both are given", "give one of them")
    return {"device": device_of_map(device_map)}


def _dtype(left: dict[str, Any], given: Any, there: Any) -> dict[str, Any]:
    old, new = left.pop("torch_dtype", None), left.pop("dtype", None)
    dtype = old if new is None else new
    if dtype is None and given.dtype != there.dtype:
        dtype = given.dtype
    return {} if dtype is None else {"dtype": dtype}


def _attention(left: dict[str, Any], given: Any, there: Any) -> dict[str, Any]:
    experts = experts_implementation(given)
    if experts != experts_implementation(there):
        raise RecipeError(
            f"experts_implementation: {short(experts)} is not supported for a converted model",
            ONLY["experts_implementation"][1],
        )
    name = left.pop("attn_implementation", None)
    # What config.json says is for the gates to judge.
    if name is None and attention_implementation(given) != attention_implementation(there):
        name = attention_implementation(given)
    return {} if name is None else {"attn_implementation": name}


def _repository(name: str, left: dict[str, Any], given: Any) -> dict[str, Any]:
    commit = left.pop("_commit_hash", None) or getattr(given, "_commit_hash", None)
    revision, token = left.pop("revision", None), left.pop("token", None)
    cached_only = left.pop("local_files_only", None)
    if os.path.exists(name):
        return {}
    if cached_only and not is_offline():
        raise RecipeError(
            "local_files_only: True is not supported for a converted model", "set HF_HUB_OFFLINE=1"
        )
    # True: the token that huggingface_hub has.
    return {"revision": revision or commit, "token": None if token is True else token}
