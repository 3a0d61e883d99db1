"""The forward pass in parts: embeddings, single decoder layers, single experts, head."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from converter.checkpoint.source import Checkpoint
from converter.forward.expert_forward import ExpertForward
from converter.forward.layer_calls import LayerCall
from converter.forward.loaded_layer import AbsentExperts, CurrentRun, HeardLinear, LoadedLayer
from converter.forward.outer_model import OuterModel
from converter.forward.trunk_weights import TrunkWeights, compute_buffers


class LayerForward:
    """Runs the parts of the model in `checkpoint`; each part reads its weights and drops them.

    products: dtype of products with large matrices. SourceError for a model whose layers cannot run
    one at a time.
    """

    def __init__(self, checkpoint: Checkpoint, products: torch.dtype = torch.float32) -> None:
        shape = checkpoint.shape
        self.experts = ExpertForward(checkpoint, products)
        self.products = products
        self._linears = {path: shape.decoder_layer(path) for path in shape.linears}
        self._ordinals = {
            module.decoder_layer: ordinal for ordinal, module in enumerate(shape.experts)
        }
        self._paths = shape.decoder_layers
        self._where = str(checkpoint.folder / "config.json")
        self._current = CurrentRun()
        model: Any = copy.deepcopy(shape.model).requires_grad_(False)
        for module in shape.experts:
            model.set_submodule(module.path, AbsentExperts(self._current))
        compute_buffers(model, self._where)
        self._layers = [model.get_submodule(path) for path in self._paths]
        for path, layer in zip(self._paths, self._layers, strict=True):
            # A list: set_submodule changes the modules that named_modules walks over.
            for name, linear in list(layer.named_modules()):
                if type(linear) is nn.Linear:
                    layer.set_submodule(name, HeardLinear(linear, f"{path}.{name}", self._current))
        self._weights = TrunkWeights(checkpoint, products)
        self._outer = OuterModel(
            model, self._paths[0].rpartition(".")[0], checkpoint, self._weights
        )
        self._calls: dict[int, list[LayerCall]] = {}

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self._layers)

    @property
    def hidden_size(self) -> int:
        """Columns of the stream."""
        return self._outer.hidden_size

    @property
    def head(self) -> str:
        """Module path of the head."""
        return self._outer.head

    def packable(self, layer: int) -> frozenset[str]:
        """Return the module paths of the linears in decoder layer `layer` that may be packed."""
        return frozenset(path for path, number in self._linears.items() if number == layer)

    def embed(self, windows: Tensor, stream: Tensor, windows_at_once: int) -> None:
        """Write the first layer's inputs for windows (int64 [n, window]) to `stream`.

        stream: float32 [n, window, hidden].
        """
        self._outer.embed(windows.flatten(), stream.flatten(0, 1))
        token_parts = torch.split(windows, windows_at_once)
        stream_parts = torch.split(stream, windows_at_once)
        for tokens, part in zip(token_parts, stream_parts, strict=True):
            part.copy_(self._outer.first_inputs(tokens, part))

    @contextmanager
    def layer(self, number: int, window: int) -> Iterator[LoadedLayer]:
        """Load decoder layer `number` for windows of `window` tokens, for this context."""
        if window not in self._calls:
            self._calls[window] = self._outer.calls(window)
        layer = self._layers[number]
        with self._weights.filled(layer, self._paths[number]):
            yield LoadedLayer(
                layer,
                self._calls[window][number],
                self._current,
                self._ordinals.get(number),
                self._where,
            )

    def head_inputs(self, window: Tensor) -> Tensor:
        """Return the head's inputs, float32 [n, hidden].

        window: the stream of one window after the last layer, float32 [n, hidden].
        """
        return self._outer.head_inputs(window[None])[0]

    def logits(self, window: Tensor) -> Tensor:
        """Return the logits, float32 [n, vocabulary].

        window: the stream of one window after the last layer, float32 [n, hidden].
        """
        return self._outer.logits(window[None])[0]
