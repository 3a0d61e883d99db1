"""Gives modules of the model on the meta device their tensors: those of the checkpoint, and those
that no file has.
"""

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
"""Rows or columns below which a linear is a gate of some kind, multiplied in float32."""


class TrunkWeights:
    """Reads the trunk of `checkpoint`. Large linears become `products`, everything else of floating
    point float32.
    """

    def __init__(self, checkpoint: Checkpoint, products: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._products = products
        self._router_rows = {module.experts for module in checkpoint.shape.experts}

    @contextmanager
    def filled(self, root: nn.Module, path: str) -> Iterator[None]:
        """Give every module in `root`, which is `path` in the model, its tensors while the context
        is open.
        """
        with _Replaced() as replaced:
            for name, module in root.named_modules(prefix=path):
                self._fill(module, name, replaced)
            yield

    @contextmanager
    def filled_when_called(self, model: nn.Module) -> Iterator[None]:
        """Give every module of `model` its tensors from its first call on, until the context is
        closed.

        So nothing is read that a run does not reach: its shard may not be there.
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
    """Tensors of modules that others stand in for, until the context is closed."""

    def __init__(self) -> None:
        self._absent: list[tuple[dict[str, Any], str, Any]] = []

    def put(self, tensors: dict[str, Any], part: str, value: Tensor) -> None:
        """Let `value` stand for tensors[part]."""
        self._absent.append((tensors, part, tensors[part]))
        tensors[part] = value

    def __enter__(self) -> "_Replaced":
        return self

    def __exit__(self, *_: object) -> None:
        for tensors, part, absent in self._absent:
            tensors[part] = absent


def compute_buffers(model: Any, where: str) -> None:
    """Compute the buffers that no file has, such as rotary frequencies, as transformers does for a
    model that it loads.

    `_init_weights` is private there: it is used here only. SourceError for a buffer that it leaves
    as it was.
    """
    for path, module in model.named_modules():
        absent = {n: b for n, b in module._buffers.items() if b is not None and b.is_meta}
        absent = {n: b for n, b in absent.items() if n in module._non_persistent_buffers_set}
        if not absent:
            continue
        found: list[dict[str, Tensor]] = []
        for start in (0, 1):
            for name, buffer in absent.items():
                module._buffers[name] = torch.full(buffer.shape, start, dtype=buffer.dtype)
            model._init_weights(module)
            found.append({name: module._buffers[name] for name in absent})
        for name in absent:
            if not torch.equal(found[0][name], found[1][name]):
                raise SourceError(
                    f"{where}: transformers does not say what {path}.{name} is; no file has it",
                    "use a checkpoint of one of the model types that README.md lists",
                )
