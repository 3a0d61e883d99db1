"""`from_pretrained` and `load_tokenizer`: a converted folder as a transformers model with its tokenizer."""

import os
import weakref
from typing import TYPE_CHECKING, Any, Literal

import torch

from formats import TRUNK_NAME
from formats.artifact import Artifact
from formats.errors import FormatError, MoeConvertError, RecipeError
from formats.reader import READERS
from loader.backend import choose_backend
from loader.budget import ram_budget, slots_per_layer
from loader.cache import ExpertCache
from loader.torch_threads import run_few_tokens_on_one_thread

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Folder = str | os.PathLike[str]


def from_pretrained(
    folder: Folder,
    *,
    device: str = "auto",
    dtype: torch.dtype | Literal["auto"] | None = None,
    ram_cache: int | str = "auto",
    io: str = "auto",
    kernels: str = "auto",
    attn_implementation: str | None = None,
) -> "PreTrainedModel":
    """A transformers `MixtralForCausalLM` whose experts come from `folder` when tokens need them.

    device: "auto" or "cpu". dtype: of activations, norms and embeddings; None and "auto" take config.json's.
    ram_cache: what experts may take in memory, bytes or a size such as "6GiB", or "auto" (loader/budget.py).
    io: "mmap" (the page cache is the cache), "pread" (reads into memory of its own; a file that is cut while it is in
    use raises instead of killing the process), or "auto": mmap where all experts fit `ram_cache`, else pread.
    kernels: "native", "torch" (the slow reference), or "auto". attn_implementation: as in transformers.

    The model has two methods more: `moe_stats()` gives a `MoeStats`, `reset_moe_stats()` sets the counters to zero.

    Raises FormatError, DamageError or VersionError naming what is wrong with the folder, before any weight is loaded;
    DoesNotFitError if `ram_cache` does not hold one token's experts; RecipeError for an unknown option value.
    """
    _check_device(device)
    if io != "auto" and io not in READERS:
        raise RecipeError(f"io: {io!r} is unknown; known are auto, {', '.join(READERS)}")
    backend = choose_backend(kernels)
    artifact = Artifact.open(folder)
    slots = slots_per_layer(ram_budget(ram_cache, artifact), artifact)
    all_fit = slots == artifact.architecture.num_local_experts
    if io == "auto":
        io = "mmap" if all_fit else "pread"
    reader = READERS[io](artifact)
    try:
        cache = ExpertCache(artifact, reader, slots, keep_views=io != "mmap" or all_fit)
        weakref.finalize(cache, reader.close)
        from loader.plugin import Parts

        model = _load(Parts(artifact, cache, backend), dtype, attn_implementation)
    except BaseException:
        reader.close()
        raise
    run_few_tokens_on_one_thread(model)
    model.moe_stats = cache.stats
    model.reset_moe_stats = cache.reset_stats
    return model


def load_tokenizer(folder: Folder) -> "PreTrainedTokenizerBase":
    """The tokenizer in `folder`; code in the folder is never run."""
    from transformers import AutoTokenizer

    if not os.path.isdir(folder):
        raise MoeConvertError(f"{folder} is not a folder", "name a folder that moe-convert wrote")
    return AutoTokenizer.from_pretrained(os.fspath(folder), trust_remote_code=False, local_files_only=True)


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


def _check_device(device: str) -> None:
    if device in ("auto", "cpu"):
        return
    if device.split(":")[0] == "cuda":
        raise MoeConvertError(
            f"device {device!r}: GPUs are not supported yet, they come in a later release", "use device='cpu'"
        )
    raise RecipeError(f"device: {device!r} is not supported; supported are auto and cpu")
