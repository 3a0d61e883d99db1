"""PEFT on the model without weights: which tensors an adapter changes, and how."""

import copy
import warnings
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from converter.checkpoint.adapters.adapter_config import (
    GET_AGAIN_HINT,
    MERGE_WITH_PEFT_HINT,
    OTHER_BASE_HINT,
)
from converter.checkpoint.adapters.adapter_folder import AdapterFolder
from converter.checkpoint.adapters.changes import (
    ADAPTER,
    Change,
    EmbeddingChange,
    LinearChange,
    Replacement,
)
from formats.config.field_rules import short
from formats.errors import SourceError
from formats.install import pip_install

_PREFIX = "base_model.model."
_SHOWN = 4


@dataclass(frozen=True)
class Changed:
    """A tensor of the model that an adapter changes.

    name: transformers' name. n_bytes: memory of the adapter's tensors. change: None for LoRA on a
    parameter of all experts; then `experts` is PEFT's layer. is_module: True for a replacement that
    unties its module from others.
    """

    name: str
    n_bytes: int
    change: Change | None
    experts: Any = None
    is_module: bool = False


def changed_tensors(
    model: Any, adapter: AdapterFolder, tensors: dict[str, Tensor]
) -> list[Changed]:
    """Return the tensors that `adapter` changes, in the order in which PEFT merges.

    model: transformers' model on the meta device; it stays as it is. tensors: all tensors of the
    adapter's file, on the meta device for a check alone. Raises SourceError, with the tensor, if
    one matches no module, is missing, or has a wrong shape.
    """
    import peft
    from peft.tuners.lora.layer import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    tuned = _loaded(copy.deepcopy(model), adapter, tensors)
    changed: list[Changed] = []
    for name, parameter in tuned.named_parameters():
        if _is_stored_base(name, parameter, tensors):
            changed.append(_replaced(_plain(name), parameter.detach()))
    for name, module in tuned.named_modules():
        path = _plain(name)
        if isinstance(module, ModulesToSaveWrapper):
            for part, values in module.modules_to_save[ADAPTER].state_dict().items():
                changed.append(_replaced(f"{path}.{part}", values, is_module=True))
        elif isinstance(module, LoraLayer):
            changed.append(_of_layer(path, module, adapter.where))
    if not changed:
        raise SourceError(
            f"{adapter.where}: peft {peft.__version__} finds nothing in it to merge",
            GET_AGAIN_HINT,
        )
    return changed


def _loaded(model: Any, adapter: AdapterFolder, tensors: dict[str, Tensor]) -> Any:
    """Return PEFT's model with the adapter's tensors; its base weights stay on the meta device."""
    import peft
    from peft.tuners.tuners_utils import cast_adapter_dtype

    class Assigning(peft.PeftModel):  # type: ignore[misc]
        """Takes the tensors as they are: a copy into one on the meta device would do nothing."""

        def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = True) -> Any:
            return super().load_state_dict(state_dict, strict=strict, assign=True)

    where = adapter.where
    try:
        with warnings.catch_warnings():
            # PEFT warns of patterns that its own conversion adds, and of tied weights.
            warnings.simplefilter("ignore")
            config = peft.LoraConfig(**adapter.config.peft_options)
            tuned = Assigning(model, config, ADAPTER, low_cpu_mem_usage=True)
            loaded: Any = peft.set_peft_model_state_dict(tuned, tensors, ADAPTER)
            cast_adapter_dtype(tuned, ADAPTER)
    # PEFT raises anything for a stranger's values: ValueError, KeyError, RuntimeError, TypeError.
    except Exception as e:
        raise SourceError(
            f"{where}: peft {peft.__version__} cannot load it on this model:"
            f" {type(e).__name__}: {short(str(e))}",
            f"{OTHER_BASE_HINT}; or update peft: {pip_install('-U', 'peft')}",
        ) from e
    if loaded.unexpected_keys:
        names = sorted(_plain(name) for name in loaded.unexpected_keys)
        raise SourceError(
            f"{where}: {len(names)} of its tensors match nothing in the model:"
            f" {', '.join(names[:_SHOWN])}",
            OTHER_BASE_HINT,
        )
    missing = sorted(n for n in loaded.missing_keys if f".{ADAPTER}" in n)
    if missing:
        raise SourceError(
            f"{where}: {len(missing)} tensors are missing that adapter_config.json asks for:"
            f" {', '.join(_plain(name) for name in missing[:_SHOWN])}",
            GET_AGAIN_HINT,
        )
    return tuned


def _is_stored_base(name: str, parameter: Any, tensors: dict[str, Tensor]) -> bool:
    """True for a weight of the base model that the adapter stores: an embedding or a bias."""
    if ".lora_" in name or ".modules_to_save." in name:
        return False
    return f"{_PREFIX}{name.removeprefix(_PREFIX)}" in tensors or not parameter.is_meta


def _replaced(name: str, values: Tensor, *, is_module: bool = False) -> Changed:
    return Changed(name, values.nbytes, Replacement(values), is_module=is_module)


def _of_layer(path: str, layer: Any, where: str) -> Changed:
    from peft.tuners.lora.layer import Embedding, Linear, ParamWrapper

    # Without the base layer, in which PEFT also nests the layer of another parameter.
    n_bytes = sum(
        parameter.nbytes
        for name, parameter in layer.named_parameters()
        if not name.startswith("base_layer.")
    )
    if isinstance(layer, ParamWrapper):
        name = f"{path}.{layer.parameter_name}"
        if layer.num_experts > 1:
            return Changed(name, n_bytes, None, layer)
        return Changed(name, n_bytes, LinearChange(layer, layer.parameter_name))
    if isinstance(layer, Embedding) and not layer.lora_magnitude_vector:
        return Changed(f"{path}.weight", n_bytes, EmbeddingChange(layer))
    if isinstance(layer, Linear):
        return Changed(f"{path}.weight", n_bytes, LinearChange(layer, "weight"))
    kind = "DoRA" if layer.lora_magnitude_vector else type(layer).__name__
    raise SourceError(
        f"{where}: {kind} on {path} cannot be merged row by row",
        MERGE_WITH_PEFT_HINT,
    )


def _plain(name: str) -> str:
    """Return the model's name of a module or tensor in PEFT's model."""
    return name.removeprefix(_PREFIX).replace(".base_layer", "").replace(f".{ADAPTER}", "")
