"""Whether anybody listens to modules: hooks, forwards that were replaced, transformers' recording of outputs."""

from collections.abc import Sequence
from types import MethodType
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from loader.transformers_names import active_collector

_RECORDER = "transformers.utils.output_capturing"
"""The module of transformers' recording hooks."""


def are_heard(modules: Sequence[nn.Module]) -> bool:
    """Whether a forward pass of these modules must really call each of them.

    transformers leaves its recording hooks in place once outputs such as router_logits were asked for; they count only
    while it records. A module's own forward that somebody left behind in the instance does not count.
    """
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return True
    for module in modules:
        own = module.__dict__
        if own["_forward_pre_hooks"] or (own["_forward_hooks"] and _matter(own["_forward_hooks"])):
            return True
        if "forward" in own and not _is_its_own(own["forward"], module):
            return True
    return False


class Watch:
    """All modules inside one, as they are now."""

    def __init__(self, root: nn.Module) -> None:
        self._inside = [
            (parent._modules, name, child)
            for parent in root.modules()
            for name, child in parent._modules.items()
            if child is not None
        ]
        self._modules = [child for _, _, child in self._inside]

    def is_heard(self) -> bool:
        """Whether a forward pass must really call each of them (`are_heard`), one is in training mode, or another
        module has come in the place of one."""
        for siblings, name, module in self._inside:
            if siblings.get(name) is not module or module.__dict__["training"]:
                return True
        return are_heard(self._modules)


def _matter(hooks: dict[int, Any]) -> bool:
    if any(getattr(hook, "__module__", None) != _RECORDER for hook in hooks.values()):
        return True
    collector = active_collector()
    return collector is None or bool(collector.get())


def _is_its_own(forward: Any, module: nn.Module) -> bool:
    return (
        isinstance(forward, MethodType)
        and forward.__self__ is module
        and forward.__func__ is getattr(type(module), "forward", None)
    )
