"""`from_pretrained` and `load_tokenizer`: a converted folder as a transformers model with its
tokenizer.
"""

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
from formats.reading.whole_files import check_files, generation_note
from loader.cuda.device.choice import Devices, choose_devices
from loader.cuda.device.device import Device
from loader.default_options import with_defaults
from loader.experts.prefetch import Prefetcher
from loader.hf.loading.configuration import loading_options, model_class
from loader.hf.loading.listed_files import link_listed_files
from loader.hf.loading.tokenizer import tokenizer_of
from loader.hf.modules.expert_layers import routed_layers
from loader.hf.served_model import Serving
from loader.option_values import check_options
from loader.placement import CacheOptions, Placement, place
from loader.repository import Folder, OpenModel, Progress, open_model, small_files

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
    attn_implementation: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    lazy: bool = False,
    progress: Progress | None = None,
    reserve_bytes: int = 0,
) -> "PreTrainedModel":
    """A causal language model of transformers whose experts come from `folder` when tokens need
    them.

    folder: one that moe-convert wrote, or owner/model on the Hub, at `revision` (None: main), with
    `token` (None: huggingface_hub's). A repository is fetched whole into huggingface_hub's cache
    and used there. With `lazy` all but the experts is fetched first; each expert comes when it is
    needed, compared with its sha256, the others meanwhile; they stay in HF_HOME/moe-convert, and a
    later start goes on. progress gets (stage, bytes there, bytes of all).
    device: "cpu", "cuda", "cuda:1", several as "cuda:0,cuda:1" (layers' experts are split between
    them, all else is on the first), or "auto": a GPU, if there is one that computes what it should
    (loader/cuda/device/choice.py) and has room.
    dtype: of activations, norms and embeddings; None and "auto" take config.json's, on GPUs without
    bfloat16 float16.
    gpu_cache: what experts may take on each GPU, bytes or a size such as "6GiB", or "auto"
    (loader/cuda/experts/gpu_budget.py).
    ram_cache: what they may take in RAM, likewise (loader/budget/ram.py); with a GPU
    page-locked, read by "direct".
    slots: experts for each layer, on the GPU if there is one, instead of what the budget holds
    spread evenly.
    io: "direct" (reads into memory of its own, past the page cache), "mmap" (experts where they lie
    in a map; the page cache is the cache; a file that is cut while it is in use kills the process),
    or "auto": mmap where all experts fit `ram_cache`, else direct.
    policy: which expert leaves a full layer: lrfu, lru or lfu (loader/experts/policy.py;
    docs/traces.md compares them).
    prefetch: how many experts of the next layer to guess and read ahead, 0 for none; "auto": as
    many as a token uses. It rests by itself where it does not pay (loader/experts/prefetch.py).
    cpu_share: "auto": missed experts are computed on the CPU where that is sooner done than copying
    them to the GPU; "off". check: "fast": compares the sha256 of the trunk when the model loads,
    and the xxh3 of each expert whenever its bytes come from a disk or a network into memory, or are
    first used in a map; "sha256": compares the experts' sha256 instead; "none". Whatever it is,
    config.json must say what the index says, but for the fields that a user may change
    (docs/security.md).
    reserve_bytes: what "auto" budgets leave free besides, for KV caches of a server for example.
    kernels: on the CPU: "native", "torch" (the slow reference), or "auto". attn_implementation: as
    in transformers.

    After a fork the child may use the model, on the CPU, with a cache of its own. It cannot be
    pickled: other processes load it. copy.deepcopy copies the trunk and shares the experts' cache.

    The model is a subclass of its transformers class with two methods more: `moe_stats()` gives a
    `MoeStats`, `reset_moe_stats()` sets the counters to zero.

    Raises FormatError, DamageError or VersionError naming what is wrong with the folder, before any
    weight is loaded; DoesNotFitError if a budget does not hold one token's experts, or the GPU not
    what was asked for; RecipeError for an unknown option value.
    """
    check_options(cpu_share=cpu_share, io=io, policy=policy, check=check)
    dtype = _floating(dtype)
    _check_attention(attn_implementation)
    opened = open_model(folder, revision, token, lazy=lazy, progress=progress)
    artifact = opened.artifact
    guesses = _guesses(prefetch, artifact.architecture)
    options = CacheOptions(
        gpu_cache, ram_cache, slots, io, policy, cpu_share, check, kernels, reserve_bytes
    )
    devices = choose_devices(device, artifact.packings)
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
    model.serve(Serving(cache, placement.decoders, placement.retry))
    return model


def load_tokenizer(
    folder: Folder, *, check: str = "fast", revision: str | None = None, token: str | None = None
) -> "PreTrainedTokenizerBase":
    """The tokenizer in `folder`, or in the repository of that name on the Hub; code from there is
    never run.

    Of a converted model only the files that its index lists are used, and compared with it; check:
    "none" takes those that somebody edited too. TokenizerError (MoeConvertError) naming what is
    wrong; HubError, FormatError, DamageError.
    """
    check_options(check=check)
    return tokenizer_of(small_files(folder, revision, token), check)


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
    from loader.hf.loading.plugin import Parts, loading
    from loader.hf.model_class import served_class

    # The configuration as our strict reader saw it, not as a second parser would.
    fields = {**artifact.config, "transformers_weights": TRUNK_NAME}
    options = loading_options(
        artifact.folder, fields, attn_implementation, error=FormatError, converted=True
    )
    parts = Parts(artifact, placement.cache, placement.backend, placement.experts)
    # With an adapter_config.json beside the weights, transformers would load that too.
    with (
        link_listed_files(artifact.folder, artifact.index, TRUNK_NAME.__eq__) as files,
        loading(parts),
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
            f"{artifact.folder}: the trunk of {artifact.index.trunk.size_bytes} bytes does not fit {placement.device}"
            f" beside the experts' slots: {str(e).splitlines()[0]}",
            "give a smaller gpu_cache, or free GPU memory",
        ) from None


def _dtype(dtype: Any, artifact: Artifact, devices: Sequence[Device]) -> Any:
    """What transformers is told. GPUs before Ampere have no instructions for bfloat16."""
    if dtype not in (None, "auto") or all(device.capability >= (8, 0) for device in devices):
        return "auto" if dtype is None else dtype
    return torch.float16 if artifact.config.get("dtype") == "bfloat16" else "auto"


def _floating(dtype: Any) -> Any:
    """None and "auto" as they are; a dtype, or its name, as the dtype."""
    if dtype in (None, "auto"):
        return dtype
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise RecipeError(
            f"dtype: {dtype!r} is no floating-point dtype", "use torch.bfloat16, float16 or float32"
        )
    return found


def _check_attention(name: str | None) -> None:
    """RecipeError unless transformers has this attention itself: for other names it would fetch
    code from the Hub.
    """
    from transformers import AttentionInterface

    known = ("eager", *AttentionInterface().valid_keys())
    if name is not None and name not in known:
        raise RecipeError(f"attn_implementation: {name!r} is unknown; known are {', '.join(known)}")


def _prefetcher(model: Any, guesses: int | None) -> Prefetcher | None:
    """Guesses by the model's routers, as many experts as these choose where `guesses` is None."""
    layers = routed_layers(model)
    if layers is None:
        _log.info(
            "experts of the next layer are not guessed: the routers of %s are not known",
            type(model).__name__,
        )
        return None
    # By the routers: config.json may ask for another number of experts than the folder was made
    # with.
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
    most = architecture.num_local_experts
    raise RecipeError(
        f"prefetch: {prefetch!r} is not a number of experts; expected is auto or 0 to {most}"
    )
