"""Finds listeners on a model's modules, which the decoder would skip because it calls no module.

Listeners are hooks, replaced forwards, replaced modules and transformers' output recording.
"""

from types import MethodType
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from loader.decode.path_counters import LeaveDecoder, Reason
from loader.hf.private_names import RECORDER_MODULE, active_collector


class Watch:
    """A snapshot of all modules inside a root module."""

    def __init__(self, root: nn.Module) -> None:
        self._inside = [
            (parent._modules, name, child, path)
            for path, parent in root.named_modules()
            for name, child in parent._modules.items()
            if child is not None
        ]

    def check(self) -> None:
        """Raise LeaveDecoder naming the first module that a forward pass must call.

        A module must be called if it has hooks, if its instance has a `forward` attribute, if it is
        in training mode, or if it has replaced another module. transformers installs recording
        hooks when a call asks for outputs such as router_logits. It keeps them; they count only
        while it records.
        """
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            raise LeaveDecoder(Reason.HOOKS, "global hooks of torch")
        for siblings, name, module, path in self._inside:
            attributes = module.__dict__
            if (present := siblings.get(name)) is not module:
                reason = Reason.ADAPTER if is_adapter(present) else Reason.REPLACED
                raise LeaveDecoder(reason, _join(path, name))
            if attributes["training"]:
                raise LeaveDecoder(Reason.TRAINING, _join(path, name))
            hooks = attributes["_forward_hooks"]
            if attributes["_forward_pre_hooks"] or (hooks and _are_active(hooks)):
                raise LeaveDecoder(Reason.HOOKS, _join(path, name))
            if "forward" in attributes and not _is_class_forward(attributes["forward"], module):
                raise LeaveDecoder(Reason.HOOKS, f"forward of {_join(path, name)}")


def check_no_adapter(root: nn.Module) -> None:
    """Raise LeaveDecoder naming the first module inside `root` that has an adapter of PEFT."""
    for path, module in root.named_modules():
        if is_adapter(module):
            raise LeaveDecoder(Reason.ADAPTER, path)


def is_adapter(module: nn.Module | None) -> bool:
    """True for a module of PEFT, which is not imported for this."""
    return type(module).__module__.partition(".")[0] == "peft"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _are_active(hooks: dict[int, Any]) -> bool:
    """True unless all hooks are recording hooks and transformers is not recording."""
    if any(getattr(hook, "__module__", None) != RECORDER_MODULE for hook in hooks.values()):
        return True
    collector = active_collector()
    return collector is None or bool(collector.get())


def _is_class_forward(forward: Any, module: nn.Module) -> bool:
    """True if `forward` is the method of the module's class, bound to the module."""
    return (
        isinstance(forward, MethodType)
        and forward.__self__ is module
        and forward.__func__ is getattr(type(module), "forward", None)
    )
