"""Whether anybody listens to a model's modules: hooks, replaced forwards and modules, transformers'
recording.
"""

from types import MethodType
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from loader.decode.path_counters import LeaveDecoder, Reason
from loader.hf.private_names import RECORDER_MODULE, active_collector


class Watch:
    """All modules inside one, as they are now."""

    def __init__(self, root: nn.Module) -> None:
        self._inside = [
            (parent._modules, name, child, path)
            for path, parent in root.named_modules()
            for name, child in parent._modules.items()
            if child is not None
        ]

    def check(self) -> None:
        """LeaveDecoder naming the module if a forward pass must really call it.

        A module must be called if it has hooks or a forward that somebody put into the instance, is
        in training mode, or has come in the place of another. transformers leaves its recording
        hooks in place once outputs such as router_logits were asked for; they count only while it
        records.
        """
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            raise LeaveDecoder(Reason.HOOKS, "global hooks of torch")
        for siblings, name, module, path in self._inside:
            own = module.__dict__
            if siblings.get(name) is not module:
                raise LeaveDecoder(Reason.REPLACED, _join(path, name))
            if own["training"]:
                raise LeaveDecoder(Reason.TRAINING, _join(path, name))
            if own["_forward_pre_hooks"] or (
                own["_forward_hooks"] and _matter(own["_forward_hooks"])
            ):
                raise LeaveDecoder(Reason.HOOKS, _join(path, name))
            if "forward" in own and not _is_its_own(own["forward"], module):
                raise LeaveDecoder(Reason.HOOKS, f"forward of {_join(path, name)}")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _matter(hooks: dict[int, Any]) -> bool:
    if any(getattr(hook, "__module__", None) != RECORDER_MODULE for hook in hooks.values()):
        return True
    collector = active_collector()
    return collector is None or bool(collector.get())


def _is_its_own(forward: Any, module: nn.Module) -> bool:
    return (
        isinstance(forward, MethodType)
        and forward.__self__ is module
        and forward.__func__ is getattr(type(module), "forward", None)
    )
