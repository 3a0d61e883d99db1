"""Translates the keyword arguments of transformers' from_pretrained for a converted model."""

import os
from collections.abc import Sequence
from typing import Any

from formats.config.field_rules import short
from formats.config.recorded_config import METHOD
from formats.errors import RecipeError
from formats.hub.hub_settings import is_offline
from loader.hf.by_name.device_map import device_of_map
from loader.hf.private_names import (
    COMMIT_HASH,
    INTERNAL_ARGUMENTS,
    attention_implementation,
    commit_hash,
    experts_implementation,
)

NO_EFFECT = INTERNAL_ARGUMENTS | {
    "adapter_kwargs", "code_revision", "low_cpu_mem_usage", "mirror", "offload_buffers",
    "offload_folder", "offload_state_dict", "tqdm_class", "trust_remote_code", "weights_only",
}  # fmt: skip
"""Arguments that are ignored, with any value. The loader never offloads layers, reads no pickles
and runs no code from the folder. It does not use an adapter beside the weights, and logs that.
"""

NEUTRAL_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "adapter_name": (("default",), "load adapters by peft"),
    "allow_all_kernels": ((False, None), ""),
    "cache_dir": ((None,), "set HF_HUB_CACHE, or name the folder in the cache"),
    "device_mesh": ((None,), ""),
    "disable_mmap": ((None, False), "give io='direct' to read experts with O_DIRECT"),
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
    "max_memory": (
        (None,),
        "give gpu_cache= and ram_cache=: the memory for experts on each GPU and in RAM",
    ),
    "output_loading_info": ((False, None), ""),
    "proxies": ((None,), "set HTTPS_PROXY"),
    "state_dict": ((None,), ""),
    "subfolder": (("", None), "name the folder itself"),
    "tp_plan": ((None,), "give device='cuda:0,cuda:1' to split the layers' experts over GPUs"),
    "tp_size": ((None, 1), "give device='cuda:0,cuda:1' to split the layers' experts over GPUs"),
    "use_kernels": ((False, None), "give kernels= for the loader's own"),
    "use_safetensors": ((None, True), "leave it out: converted folders hold safetensors only"),
    "variant": ((None,), ""),
}  # fmt: skip
"""Argument -> (neutral values, hint for other values). A neutral value is accepted and does
nothing. Any other value is an error.
"""


def loader_options(
    name: str, given: Any, stored: Any, arguments: dict[str, Any], known: Sequence[str]
) -> dict[str, Any]:
    """Return the options of loader.from_pretrained for transformers' keyword arguments.

    given: the caller's configuration; transformers puts some of the arguments into it.
    stored: the configuration of the folder or repository `name`.
    known: names of the options of loader.from_pretrained.
    Raises RecipeError naming an argument that is not supported.
    """
    left = {key: value for key, value in arguments.items() if key not in NO_EFFECT}
    for argument, (neutral, hint) in NEUTRAL_ONLY.items():
        value = left.pop(argument, None)
        if value is not None and value not in neutral:
            raise RecipeError(
                f"{argument}: {short(value)} is not supported for a converted model", hint
            )
    _check_quantization(left.pop("quantization_config", None))
    options = {
        **_device(left),
        **_dtype(left, given, stored),
        **_attention(left, given, stored),
        **_repository(name, left, given),
    }
    if unknown := sorted(left.keys() - set(known)):
        raise RecipeError(
            f"{unknown[0]}: unknown argument for a converted model",
            f"known arguments: {', '.join(known)}, device_map",
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
            f"quantization_config: {name} is given, but the model is already converted",
            "leave it out, or convert the checkpoint again with other --bits",
        )


def _device(left: dict[str, Any]) -> dict[str, Any]:
    device_map = left.pop("device_map", None)
    if device_map is None:
        return {}
    if left.get("device") is not None:
        raise RecipeError("device, device_map: both are given", "give only one of them")
    return {"device": device_of_map(device_map)}


def _dtype(left: dict[str, Any], given: Any, stored: Any) -> dict[str, Any]:
    old_name = left.pop("torch_dtype", None)
    dtype = left.pop("dtype", None)
    if dtype is None:
        dtype = old_name
    if dtype is None and given.dtype != stored.dtype:
        dtype = given.dtype
    return {} if dtype is None else {"dtype": dtype}


def _attention(left: dict[str, Any], given: Any, stored: Any) -> dict[str, Any]:
    experts = experts_implementation(given)
    if experts != experts_implementation(stored):
        raise RecipeError(
            f"experts_implementation: {short(experts)} is not supported for a converted model",
            NEUTRAL_ONLY["experts_implementation"][1],
        )
    name = left.pop("attn_implementation", None)
    # A value from config.json is not the caller's choice: formats/config checks that one.
    if name is None and attention_implementation(given) != attention_implementation(stored):
        name = attention_implementation(given)
    return {} if name is None else {"attn_implementation": name}


def _repository(name: str, left: dict[str, Any], given: Any) -> dict[str, Any]:
    commit = left.pop(COMMIT_HASH, None) or commit_hash(given)
    revision = left.pop("revision", None)
    token = left.pop("token", None)
    cached_only = left.pop("local_files_only", None)
    if os.path.exists(name):
        return {}
    if cached_only and not is_offline():
        raise RecipeError(
            "local_files_only: True is not supported for a converted model", "set HF_HUB_OFFLINE=1"
        )
    # token=True means huggingface_hub's stored token, which None uses too.
    return {"revision": revision or commit, "token": None if token is True else token}
