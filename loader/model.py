"""`from_pretrained` and `load_tokenizer`: a converted folder as a transformers model with its tokenizer."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from formats import TRUNK_NAME
from formats.errors import FormatError, MoeConvertError, RecipeError
from formats.index import Architecture
from formats.readers import READERS
from loader.backend import choose_backend
from loader.budget import check_slots, experts_aside, ram_budget, slots_of_folder
from loader.cache import ExpertCache
from loader.policy import POLICIES
from loader.prefetch import Prefetcher
from loader.repository import Folder, Progress, open_model, small_files
from loader.torch_threads import run_few_tokens_on_one_thread

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def from_pretrained(
    folder: Folder,
    *,
    device: str = "auto",
    dtype: torch.dtype | Literal["auto"] | None = None,
    ram_cache: int | str = "auto",
    slots: Sequence[int] | None = None,
    io: str = "auto",
    policy: str = "lrfu",
    prefetch: int | str = "auto",
    check: str = "none",
    kernels: str = "auto",
    attn_implementation: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    lazy: bool = False,
    progress: Progress | None = None,
) -> "PreTrainedModel":
    """A transformers `MixtralForCausalLM` whose experts come from `folder` when tokens need them.

    folder: one that moe-convert wrote, or owner/model on the Hub, at `revision` (None: main), with `token` (None:
    huggingface_hub's). A repository is fetched whole into huggingface_hub's cache and used there. With `lazy` all but
    the experts is fetched first; each expert comes when it is needed, compared with its sha256, the others meanwhile;
    they stay in HF_HOME/moe-convert, and a later start goes on. progress gets (stage, bytes there, bytes of all).
    device: "auto" or "cpu". dtype: of activations, norms and embeddings; None and "auto" take config.json's.
    ram_cache: what experts may take in memory, bytes or a size such as "6GiB", or "auto" (loader/budget.py).
    slots: experts in memory for each layer, instead of what `ram_cache` holds spread evenly.
    io: "direct" (reads into memory of its own, past the page cache), "mmap" (experts where they lie in a map; the page
    cache is the cache; a file that is cut while it is in use kills the process), or "auto": mmap where all experts fit
    `ram_cache`, else direct.
    policy: which expert leaves a full layer: lrfu, lru or lfu (loader/policy.py; docs/traces.md compares them).
    prefetch: how many experts of the next layer to guess and read ahead, 0 for none; "auto": as many as a token uses.
    It rests by itself where it does not pay (loader/prefetch.py).
    check: "none", or "first-touch": compare the sha256 of each expert when it is first read.
    kernels: "native", "torch" (the slow reference), or "auto". attn_implementation: as in transformers.

    The model has two methods more: `moe_stats()` gives a `MoeStats`, `reset_moe_stats()` sets the counters to zero.

    Raises FormatError, DamageError or VersionError naming what is wrong with the folder, before any weight is loaded;
    DoesNotFitError if `ram_cache` does not hold one token's experts; RecipeError for an unknown option value.
    """
    _check_device(device)
    _check_known("io", io, ("auto", *READERS))
    _check_known("policy", policy, tuple(POLICIES))
    _check_known("check", check, ("none", "first-touch"))
    backend = choose_backend(kernels)
    opened = open_model(folder, revision, token, lazy=lazy, progress=progress)
    artifact = opened.artifact
    architecture = artifact.architecture
    io = opened.io(io)
    guesses = _guesses(prefetch, architecture)
    if slots is None:
        slots = slots_of_folder(artifact, ram_budget(ram_cache, artifact), io)
    else:
        check_slots(slots, artifact)
    if io == "auto":
        io = "mmap" if min(slots) == architecture.num_local_experts else "direct"
    reader = opened.reader(io, check=check == "first-touch")
    try:
        cache = ExpertCache(reader, slots, aside=experts_aside(architecture), policy=POLICIES[policy])
        from loader.plugin import Parts
        from loader.token_forward import one_token

        model = _load(Parts(artifact, cache, backend), dtype, attn_implementation)
    except BaseException:
        reader.close()
        raise
    if guesses:
        layers = model.model.layers
        routers, norms = zip(*((x.mlp.gate.weight, x.post_attention_layernorm.weight) for x in layers), strict=True)
        cache.prefetcher = Prefetcher(routers, norms, architecture.num_experts_per_tok, guesses)
    run_few_tokens_on_one_thread(model, one_token)
    model.moe_stats = cache.stats
    model.reset_moe_stats = cache.reset_stats
    return model


def load_tokenizer(
    folder: Folder, *, revision: str | None = None, token: str | None = None
) -> "PreTrainedTokenizerBase":
    """The tokenizer in `folder`, or in the repository of that name on the Hub; code from there is never run."""
    from transformers import AutoTokenizer

    path = small_files(folder, revision, token)
    return AutoTokenizer.from_pretrained(os.fspath(path), trust_remote_code=False, local_files_only=True)


def _load(parts: Any, dtype: Any, attn_implementation: str | None) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    from loader.plugin import loading

    activation = parts.artifact.config.get("hidden_act", "silu")
    if activation != "silu":
        raise FormatError(f"{parts.artifact.folder / 'config.json'}: hidden_act is {activation!r}, Mixtral's is 'silu'")
    # The configuration as our strict reader saw it, not as a second parser would.
    config = MixtralConfig.from_dict({**parts.artifact.config, "transformers_weights": TRUNK_NAME})
    options: dict[str, Any] = {"dtype": "auto" if dtype is None else dtype}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    with loading(parts):
        model = MixtralForCausalLM.from_pretrained(
            os.fspath(parts.artifact.folder),
            config=config,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            **options,
        )
    # transformers 5.0 leaves weights of a quantized model in the dtype of the file.
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point() and parameter.dtype != model.config.dtype:
                parameter.data = parameter.data.to(model.config.dtype)
    return model.eval()


def _guesses(prefetch: int | str, architecture: Architecture) -> int:
    if prefetch == "auto":
        return architecture.num_experts_per_tok
    if isinstance(prefetch, int) and 0 <= prefetch <= architecture.num_local_experts:
        return prefetch
    most = architecture.num_local_experts
    raise RecipeError(f"prefetch: {prefetch!r} is not a number of experts; expected is auto or 0 to {most}")


def _check_known(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise RecipeError(f"{option}: {value!r} is unknown; known are {', '.join(known)}")


def _check_device(device: str) -> None:
    if device in ("auto", "cpu"):
        return
    if device.split(":")[0] == "cuda":
        raise MoeConvertError(
            f"device {device!r}: GPUs are not supported yet, they come in a later release", "use device='cpu'"
        )
    raise RecipeError(f"device: {device!r} is not supported; supported are auto and cpu")
