"""Checks an adapter's configuration against the packed weights of a model."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from formats.errors import MoeConvertError
from loader.hf.modules.packed_modules import CachedExperts, PackedLinear
from loader.hf.modules.packed_weight import MERGE_HINT, UNPACKED_HINT

_FUSED = ("gate_up_proj", "down_proj")
"""transformers' parameters with the weights of all experts of a layer."""
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""Usual names of one expert's projections in checkpoints."""
_INITS_FROM_WEIGHTS = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Values of PEFT's init_lora_weights that decompose the weights; some continue with a number."""


@dataclass(frozen=True)
class PackedTargets:
    """Names of the packed weights of one model.

    linears: paths of packed linear layers. experts: paths of modules with packed experts.
    expert_names: names under which adapters know packed experts, by module, parameter or tensor.
    """

    linears: tuple[str, ...]
    experts: tuple[str, ...]
    expert_names: tuple[str, ...]

    @classmethod
    def find(cls, model: nn.Module) -> "PackedTargets":
        """Return the packed weights in `model`, which may have adapters already."""
        linears = []
        experts = {}
        for path, module in model.named_modules():
            if isinstance(module, PackedLinear):
                linears.append(path.replace(".base_layer", ""))
            elif isinstance(module, CachedExperts):
                experts[path] = module
        return cls(tuple(linears), tuple(experts), tuple(_expert_names(model, experts)))

    def check(self, config: Any, matches: Callable[[str], object]) -> None:
        """Raise MoeConvertError if packed weights cannot have the adapter of `config`.

        config: PEFT's configuration of an adapter. matches: tells if its target_modules name a
        module, by the module's path.
        """
        targets = getattr(config, "target_modules", None)
        if targets and not is_all_linear(config):
            for name in self.expert_names:
                if matches(name):
                    raise MoeConvertError(
                        f"target_modules {_shown(targets)}: {name} is a packed expert, and packed"
                        " experts take no adapter",
                        MERGE_HINT,
                    )
        for target in getattr(config, "target_parameters", None) or ():
            self._check_parameter(target)
        for module in getattr(config, "modules_to_save", None) or ():
            self._check_saved_module(module)
        if option := _option_that_reads_weights(config):
            for path in self.linears if targets else ():
                if is_all_linear(config) or matches(path):
                    raise MoeConvertError(
                        f"{option} needs the values of {path}, which is packed", UNPACKED_HINT
                    )

    def forget_experts(self, config: Any) -> list[str]:
        """Remove the packed experts from a configuration whose targets PEFT chose by itself.

        Returns the removed targets. A saved adapter would name them otherwise.
        """
        removed = set()
        for field in ("target_modules", "feedforward_modules", "target_parameters"):
            targets = getattr(config, field, None)
            if not targets or isinstance(targets, str):
                continue
            ours = {target for target in targets if any(map(_ending(target), self.expert_names))}
            setattr(config, field, type(targets)(x for x in targets if x not in ours))
            removed |= ours
        for field in ("rank_pattern", "alpha_pattern"):
            patterns = getattr(config, field, None) or {}
            for pattern in list(patterns):
                if any(re.match(rf"(.*\.)?({pattern})$", name) for name in self.expert_names):
                    del patterns[pattern]
        return sorted(removed)

    def _check_parameter(self, target: str) -> None:
        matches = _ending(target)
        for name in self.expert_names:
            if matches(name):
                raise MoeConvertError(
                    f"target_parameters {target!r}: {name} is packed, and packed experts take no"
                    " adapter",
                    MERGE_HINT,
                )
        for path in self.linears:
            if matches(f"{path}.weight"):
                raise MoeConvertError(
                    f"target_parameters {target!r}: {path}.weight is packed",
                    f"name the module instead: target_modules=[{path.rpartition('.')[2]!r}]",
                )

    def _check_saved_module(self, module: str) -> None:
        for path in (*self.linears, *self.experts):
            parts = path.split(".")
            # PEFT copies and trains a module with all modules inside.
            if any(".".join(parts[:end]).endswith(module) for end in range(1, len(parts) + 1)):
                raise MoeConvertError(
                    f"modules_to_save {module!r}: {path} is packed and cannot be trained",
                    MERGE_HINT if path in self.experts else UNPACKED_HINT,
                )


def is_all_linear(config: Any) -> bool:
    """True if PEFT chooses all linear layers as targets."""
    targets = getattr(config, "target_modules", None)
    return isinstance(targets, str) and targets.lower() == "all-linear"


def _expert_names(model: Any, modules: dict[str, CachedExperts]) -> Iterator[str]:
    """Yield names of the experts: transformers' own, then those of checkpoints."""
    if not modules:
        return
    projections, renamings = _checkpoint_names(model.config.model_type)
    for path, module in modules.items():
        yield path
        for name in _FUSED:
            yield f"{path}.{name}"
        places = {path: None} | {path.replace(new, old): None for new, old in renamings}
        for place in places:
            for expert in sorted(module.layouts):
                for name in projections:
                    yield f"{place}.{expert}.{name}"


def _checkpoint_names(model_type: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the names of an expert's projections in checkpoints, and (new, old) parts of paths."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    projections = dict.fromkeys(_PROJECTIONS)
    renamings = []
    for conversion in get_checkpoint_conversion_mapping(model_type) or ():
        for old in conversion.source_patterns:
            _, is_expert, tensor = old.partition(".experts.*.")
            if is_expert:
                projections[tensor.removesuffix(".weight")] = None
            else:
                renamings += [(new, old) for new in conversion.target_patterns]
    return list(projections), renamings


def _ending(target: str) -> Callable[[str], bool]:
    """Return the function that tells if a name is `target` or ends with it, as PEFT compares."""
    return lambda name: name == target or name.endswith(f".{target}")


def _option_that_reads_weights(config: Any) -> str | None:
    if getattr(config, "use_dora", False):
        return "use_dora=True"
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str) and init.lower().startswith(_INITS_FROM_WEIGHTS):
        return f"init_lora_weights={init!r}"
    return None


def _shown(targets: Any) -> str:
    return repr(targets if isinstance(targets, str) else sorted(targets))
