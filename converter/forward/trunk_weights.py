"""Gives modules on the meta device their tensors: the checkpoint's, and buffers of no file."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from converter.checkpoint.source import Checkpoint
from converter.forward.expert_forward import read_finite
from converter.forward.loaded_layer import HeardLinear
from formats.errors import SourceError

_NARROW = 64
"""A linear with fewer rows or columns is a gate of some kind; its products stay float32."""


class TrunkWeights:
    """Reads the trunk of `checkpoint`: large linears in dtype `products`, the rest in float32."""

    def __init__(self, checkpoint: Checkpoint, products: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._products = products
        self._router_rows = {module.experts for module in checkpoint.shape.experts}

    @contextmanager
    def filled(self, root: nn.Module, path: str) -> Iterator[None]:
        """Give every module in `root` its tensors for this context.

        path: module path of `root` in the model.
        """
        with _Replaced() as replaced:
            for name, module in root.named_modules(prefix=path):
                self._fill(module, name, replaced)
            yield

    @contextmanager
    def filled_when_called(self, model: nn.Module) -> Iterator[None]:
        """Give every module of `model` its tensors from its first call to the context's end.

        A module that no run reaches reads nothing: its shard may not be on disk.
        """

        def fill(name: str, module: nn.Module, _inputs: Any) -> None:
            self._fill(module, name, replaced)

        with _Replaced() as replaced, ExitStack() as hooks:
            for name, module in model.named_modules():
                hooks.enter_context(module.register_forward_pre_hook(partial(fill, name)))
            yield

    def _fill(self, module: nn.Module, path: str, replaced: "_Replaced") -> None:
        for tensors in (module._parameters, module._buffers):
            for part, absent in list(tensors.items()):
                weight = self._checkpoint.trunk.get(f"{path}.{part}".lstrip("."))
                if weight is None or absent is None or not absent.is_meta:
                    continue
                values = read_finite(self._checkpoint, weight, 0, weight.shape[0])
                large = part == "weight" and self._is_large(module)
                replaced.put(tensors, part, values.to(self._products if large else torch.float32))

    def _is_large(self, module: nn.Module) -> bool:
        return (
            isinstance(module, HeardLinear)
            and min(module.in_features, module.out_features) >= _NARROW
            and module.out_features not in self._router_rows
        )


class _Replaced:
    """Tensors of modules that are replaced for a context."""

    def __init__(self) -> None:
        self._absent: list[tuple[dict[str, Any], str, Any]] = []

    def put(self, tensors: dict[str, Any], part: str, value: Tensor) -> None:
        """Replace tensors[part] by `value`."""
        self._absent.append((tensors, part, tensors[part]))
        tensors[part] = value

    def __enter__(self) -> "_Replaced":
        return self

    def __exit__(self, *_: object) -> None:
        for tensors, part, absent in self._absent:
            tensors[part] = absent


def compute_buffers(model: Any, where: str) -> None:
    """Compute the buffers of no file, such as rotary frequencies, as transformers does on loading.

    `_init_weights` is private in transformers; no other function uses it. SourceError for a buffer
    that it does not set.
    """
    for path, module in model.named_modules():
        absent = {n: b for n, b in module._buffers.items() if b is not None and b.is_meta}
        absent = {n: b for n, b in absent.items() if n in module._non_persistent_buffers_set}
        if not absent:
            continue
        # A buffer that _init_weights does not set keeps its start value.
        computed: list[dict[str, Tensor]] = []
        for start in (0, 1):
            for name, buffer in absent.items():
                module._buffers[name] = torch.full(buffer.shape, start, dtype=buffer.dtype)
            model._init_weights(module)
            computed.append({name: module._buffers[name] for name in absent})
        for name in absent:
            if not torch.equal(computed[0][name], computed[1][name]):
                raise SourceError(
                    f"{where}: buffer {path}.{name} is in no file, and transformers does not"
                    " compute it",
                    "use a checkpoint of one of the model types that README.md lists",
                )
