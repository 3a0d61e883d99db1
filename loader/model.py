"""`from_pretrained` and `load_tokenizer`: a converted folder as a transformers model."""

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from formats import TRUNK_NAME
from formats.artifact import Artifact
from formats.errors import DoesNotFitError, FormatError, RecipeError
from formats.files.log_once import warn_once
from formats.index import Architecture
from formats.progress import Progress
from formats.reading.whole_files import check_files, generation_note
from loader.cuda.device.device import Device
from loader.cuda.device_choice import Devices, choose_devices
from loader.decode.kv_bits_check import check_8bit_cache
from loader.default_options import with_defaults
from loader.experts.prefetch import Prefetcher
from loader.hf.loading.configuration import loading_options, model_class
from loader.hf.loading.listed_files import link_listed_files
from loader.hf.loading.tokenizer import open_tokenizer
from loader.hf.modules.expert_layers import routed_layers
from loader.hf.served_model import Serving
from loader.option_values import check_options
from loader.placement import CacheOptions, Placement, place
from loader.repository import Folder, OpenModel, head_of_repository, open_model, small_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


@with_defaults
def from_pretrained(
    folder: Folder,
    *,
    device: Devices = "auto",
    dtype: torch.dtype | Literal["auto"] | None = None,
    gpu_cache: int | str = "auto",
    ram_cache: int | str = "auto",
    slots: Sequence[int] | None = None,
    io: str = "auto",
    policy: str = "lrfu",
    prefetch: int | str = "auto",
    cpu_share: str = "off",
    check: str = "fast",
    kernels: str = "auto",
    kv_bits: int = 16,
    attn_implementation: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    lazy: bool = False,
    progress: Progress | None = None,
    reserve_bytes: int = 0,
) -> "PreTrainedModel":
    """Load a converted folder as a causal language model of transformers.

    Experts are read from the files when tokens need them, through a cache.

    folder: a folder that moe-convert wrote, or owner/model, a repository on the Hub.
    device: "auto" (default), "cpu", "cuda", "cuda:1", or several as "cuda:0,cuda:1". Several GPUs
        share the layers' experts; everything else is on the first one. "auto" takes a GPU that has
        room and passes a check of small products (loader/cuda/device_choice.py), else the CPU.
    dtype: floating-point dtype of activations, norms and embeddings. None (default) and "auto" take
        config.json's, or float16 on GPUs without bfloat16.
    gpu_cache: memory for experts on each GPU: bytes, a size such as "6GiB", or "auto" (default,
        loader/cuda/experts/gpu_budget.py).
    ram_cache: memory for experts in RAM: bytes, a size, or "auto" (default, loader/budget/ram.py).
        With a GPU this RAM is page-locked.
    slots: number of experts that each layer keeps, one number for each layer; on the GPU if there
        is one. None (default): as many as the budget holds, spread evenly.
    io: how experts are read. "direct": O_DIRECT reads into the cache's memory, past the page cache.
        "mmap": experts are used in mapped files, and the page cache is the cache; if a file is
        truncated while in use, the process is killed. "auto" (default): mmap if all experts fit
        `ram_cache`, else direct. GPUs and `lazy` need direct.
    policy: eviction policy, "lrfu" (default), "lru" or "lfu" (docs/traces.md compares them).
    prefetch: experts of the next layer to guess and read ahead; 0 for none. "auto" (default): as
        many as a token uses. Prefetch pauses where it does not pay (loader/experts/prefetch.py).
    cpu_share: "auto": the CPU computes a missed expert if that is faster than its copy to the GPU.
        "off" (default): the GPU computes all experts.
    check: how files are verified. "fast" (default): the trunk's sha256 at loading; an expert's xxh3
        whenever it is read from disk or network, or first used in a map. "sha256": experts by
        their sha256 instead. "none": nothing is hashed. With each of them, config.json must agree
        with the index, except for fields that users may change (docs/security.md).
    kernels: products on the CPU. "native"; "torch", the slow reference; "auto" (default): native if
        it is available.
    kv_bits: bits of a number in KV caches. 16 (default): the model's dtype. 8: int8 with a scale
        for each 64 values, about half of the bytes of bfloat16; on the CPU, for model types with a
        decoder (loader/decode/specs.py).
    attn_implementation: attention of transformers, such as "sdpa" or "eager". None (default):
        transformers chooses. Attention code from the Hub is refused.
    revision: branch, tag or commit of the repository. None (default): main.
    token: Hub token. None (default): the one that huggingface_hub finds.
    lazy: False (default) downloads the whole repository into huggingface_hub's cache first. True
        downloads everything but the experts first; an expert is downloaded when it is needed and
        verified by its sha256, the others in background. Files stay in HF_HOME/moe-convert, and a
        later start continues.
    progress: called with (stage, done bytes, total bytes) during a lazy download, from any thread.
    reserve_bytes: bytes that "auto" budgets leave free in addition, for example for a server's KV
        caches. Default 0.

    The model is a subclass of its transformers class with two more methods: `moe_stats()` returns a
    `MoeStats`, `reset_moe_stats()` sets the counters to zero.

    A forked child can use the model on the CPU, with its own cache. A model cannot be pickled: each
    process loads it. copy.deepcopy copies the trunk and shares the experts' cache.

    Raises FormatError, DamageError or VersionError if the folder is wrong, before any weight is
    loaded; DoesNotFitError if a budget does not hold one token's experts, or if the GPU has too
    little memory; RecipeError for an unknown option value; HubError if a download fails.
    """
    check_options(cpu_share=cpu_share, io=io, policy=policy, check=check, kv_bits=kv_bits)
    dtype = _floating(dtype)
    _check_attention(attn_implementation)
    if kv_bits == 8 and (head := head_of_repository(folder, revision, token)):
        # Before the weights are downloaded.
        check_8bit_cache(head.index.architecture, head.config, [])
    opened = open_model(folder, revision, token, lazy=lazy, progress=progress)
    artifact = opened.artifact
    guesses = _guesses(prefetch, artifact.architecture)
    options = CacheOptions(
        gpu_cache, ram_cache, slots, io, policy, cpu_share, check, kernels, reserve_bytes
    )
    devices = choose_devices(device, artifact.packings)
    if kv_bits == 8:
        check_8bit_cache(artifact.architecture, artifact.config, devices)
    try:
        model, placement = _placed(opened, devices, options, dtype, attn_implementation)
    except DoesNotFitError as e:
        if not devices or device != "auto" or gpu_cache != "auto":
            raise
        _log.warning("the GPU is not used: %s", e)
        model, placement = _placed(opened, [], options, dtype, attn_implementation)
    cache = placement.cache
    if guesses:
        cache.prefetcher = _prefetcher(model, guesses if prefetch != "auto" else None)
    model.serve(Serving(cache, placement.decoders, placement.retry, kv_bits))
    return model


def load_tokenizer(
    folder: Folder, *, check: str = "fast", revision: str | None = None, token: str | None = None
) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a folder or of a repository on the Hub. Code from there never runs.

    folder: a folder, or owner/model.
    check: "fast" (default) and "sha256" use only the files that a converted model's index lists,
        and verify them; "none" also takes files that were edited.
    revision: branch, tag or commit of the repository. None (default): main.
    token: Hub token. None (default): the one that huggingface_hub finds.

    Raises TokenizerError (a MoeConvertError) if the files make no tokenizer; HubError, FormatError
    or DamageError.
    """
    check_options(check=check)
    return open_tokenizer(small_files(folder, revision, token), check)


def _placed(
    opened: OpenModel,
    devices: Sequence[Device],
    options: CacheOptions,
    dtype: Any,
    attn_implementation: str | None,
) -> tuple[Any, Placement]:
    placement = place(opened, devices, options)
    try:
        artifact = opened.artifact
        if options.check != "none":
            check_files(artifact.folder, artifact.index, [artifact.index.trunk.file])
            if note := generation_note(artifact.folder, artifact.index):
                warn_once(note)
        return _load(
            artifact, placement, _dtype(dtype, artifact, devices), attn_implementation
        ), placement
    except BaseException:
        placement.cache.close()
        raise


def _load(
    artifact: Artifact, placement: Placement, dtype: Any, attn_implementation: str | None
) -> Any:
    from loader.hf.adapters.peft_check import check_adapters
    from loader.hf.loading.plugin import Parts, use_parts
    from loader.hf.model_class import served_class

    check_adapters()
    # The fields that the strict reader checked; a second parser could see others.
    fields = {**artifact.config, "transformers_weights": TRUNK_NAME}
    options = loading_options(
        artifact.folder, fields, attn_implementation, error=FormatError, converted=True
    )
    parts = Parts(artifact, placement.cache, placement.backend, placement.experts)
    # Links to the listed files only: transformers would load an adapter_config.json too.
    with (
        link_listed_files(artifact.folder, artifact.index, TRUNK_NAME.__eq__) as files,
        use_parts(parts),
    ):
        try:
            base = model_class(options["config"])
            model = served_class(base).from_pretrained(os.fspath(files), dtype=dtype, **options)
        except ImportError as e:
            if attn_implementation is None:
                raise
            raise RecipeError(
                f"attn_implementation: {attn_implementation!r}: {e}", "install it, or use sdpa"
            ) from e
    model.name_or_path = model.config.name_or_path = os.fspath(artifact.folder)
    # transformers 5.0 leaves weights of a quantized model in the dtype of the file.
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point() and parameter.dtype != model.config.dtype:
                parameter.data = parameter.data.to(model.config.dtype)
    try:
        return model.to(placement.device).eval()
    except torch.OutOfMemoryError as e:
        raise DoesNotFitError(
            f"{artifact.folder}: the trunk of {artifact.index.trunk.size_bytes} bytes does not fit"
            f" {placement.device} beside the experts' slots: {str(e).splitlines()[0]}",
            "give a smaller gpu_cache, or free GPU memory",
        ) from None


def _dtype(dtype: Any, artifact: Artifact, devices: Sequence[Device]) -> Any:
    """Return the dtype for transformers. GPUs before Ampere have no bfloat16 instructions."""
    if dtype not in (None, "auto") or all(device.capability >= (8, 0) for device in devices):
        return "auto" if dtype is None else dtype
    return torch.float16 if artifact.config.get("dtype") == "bfloat16" else "auto"


def _floating(dtype: Any) -> Any:
    """Return a dtype for a dtype or its name; None and "auto" unchanged. RecipeError for others."""
    if dtype in (None, "auto"):
        return dtype
    value = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise RecipeError(
            f"dtype: {dtype!r} is no floating-point dtype", "use torch.bfloat16, float16 or float32"
        )
    return value


def _check_attention(name: str | None) -> None:
    """Raise RecipeError unless transformers has this attention: it fetches others from the Hub."""
    from transformers import AttentionInterface

    known = ("eager", *AttentionInterface().valid_keys())
    if name is not None and name not in known:
        raise RecipeError(f"attn_implementation: {name!r} is unknown; known are {', '.join(known)}")


def _prefetcher(model: Any, guesses: int | None) -> Prefetcher | None:
    """Return a prefetcher over the model's routers; `guesses` None: as many as a router chooses."""
    layers = routed_layers(model)
    if layers is None:
        _log.info(
            "prefetch is off: the routers of %s are not known",
            type(model).__name__,
        )
        return None
    # From the routers: config.json may name another number than the folder was converted with.
    count = layers[0].router.top_k if guesses is None else guesses
    return Prefetcher([x.router.weight for x in layers], [x.norm.weight for x in layers], count)


def _guesses(prefetch: int | str, architecture: Architecture) -> int:
    if prefetch == "auto":
        return architecture.num_experts_per_tok
    if (
        isinstance(prefetch, int)
        and not isinstance(prefetch, bool)
        and 0 <= prefetch <= architecture.num_local_experts
    ):
        return prefetch
    experts = architecture.num_local_experts
    raise RecipeError(
        f"prefetch: {prefetch!r} is not a number of experts; expected auto or 0 to {experts}"
    )
