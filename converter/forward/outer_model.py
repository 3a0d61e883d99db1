"""The model without its decoder layers: before the first, after the last, and their calls."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from converter.checkpoint.source import Checkpoint
from converter.forward.expert_forward import ranges, read_finite
from converter.forward.layer_calls import (
    CallRecorder,
    LayerCall,
    Visit,
    cannot_run_alone,
    compare_calls,
)
from converter.forward.trunk_weights import TrunkWeights

VOCABULARY_AT_ONCE = 4096
"""Rows of the embeddings and of the head."""


class OuterModel:
    """Runs transformers' `model` with stand-ins for decoder layers, embeddings and head.

    Embeddings and head are read in slices, the other weights when a run reaches them. For one
    thread at a time.
    """

    def __init__(
        self, model: Any, layers_path: str, checkpoint: Checkpoint, weights: TrunkWeights
    ) -> None:
        self._checkpoint = checkpoint
        self._weights = weights
        self._where = str(checkpoint.folder / "config.json")
        embeddings = _path_of(model, model.get_input_embeddings())
        head = _path_of(model, model.get_output_embeddings())
        self.head = head
        """Module path of the head."""
        trunk = checkpoint.trunk
        self._embeddings = trunk[f"{embeddings}.weight"]
        self._head_weight = trunk.get(f"{head}.weight", self._embeddings)
        self._stand_ins = _StandIns()
        layers = model.get_submodule(layers_path)
        self._last = len(layers) - 1
        for number, layer in enumerate(layers):
            layers[number] = _Station(number, layer, self._stand_ins)
        model.set_submodule(embeddings, _Embeddings(self._stand_ins))
        model.set_submodule(head, _Head(self._stand_ins))
        self._model = model

    @property
    def hidden_size(self) -> int:
        """Columns of the embeddings, which are the stream's."""
        return self._embeddings.shape[1]

    def embed(self, tokens: Tensor, out: Tensor) -> None:
        """Write the stored embeddings of `tokens` (int64 [n]) to `out`, float32 [n, hidden]."""
        for begin, end in ranges(self._embeddings.shape[0], VOCABULARY_AT_ONCE):
            rows = read_finite(self._checkpoint, self._embeddings, begin, end)
            positions = ((tokens >= begin) & (tokens < end)).nonzero()[:, 0]
            out[positions] = rows[tokens[positions] - begin].float()

    def first_inputs(self, windows: Tensor, embedded: Tensor) -> Tensor:
        """Return the first layer's inputs, [n, window, hidden].

        windows: tokens, int64 [n, window]. embedded: their embeddings, [n, window, hidden].
        """

        def stop(_number: int, stream: Tensor, *_: Any) -> Tensor:
            raise _Stopped(stream)

        self._stand_ins.visit = stop
        self._stand_ins.embedded = embedded
        return self._stopped(input_ids=windows)

    def calls(self, window: int) -> list[LayerCall]:
        """Return the calls of all layers for windows of `window` tokens.

        SourceError if the calls depend on anything but the length of the windows.
        """
        recorders = [CallRecorder(seed, self._where) for seed in (0, 1)]
        for seed, recorder in enumerate(recorders):
            random = torch.Generator().manual_seed(seed)
            tokens = torch.randint(self._embeddings.shape[0], (1, window), generator=random)
            self._stand_ins.visit = self._until_last(recorder.visit)
            embedded = torch.randn(1, window, 1, generator=random)
            self._stand_ins.embedded = embedded.expand(-1, -1, self.hidden_size)
            self._stopped(input_ids=tokens)
        first, second = (recorder.calls for recorder in recorders)
        compare_calls(first, second, self._where)
        return first

    def head_inputs(self, stream: Tensor) -> Tensor:
        """Return the head's inputs, float32 [1, n, hidden].

        stream: the stream after the last layer, float32 [1, n, hidden].
        """

        def stop(x: Tensor) -> Tensor:
            raise _Stopped(x)

        self._inject(stream, stop)
        return self._stopped(inputs_embeds=torch.zeros(stream.shape))

    def logits(self, stream: Tensor) -> Tensor:
        """Return the logits, float32 [1, n, vocabulary].

        stream: the stream after the last layer, float32 [1, n, hidden].
        """
        self._inject(stream, self._multiply_head)
        with self._weights.filled_when_called(self._model), torch.no_grad():
            logits: Tensor = self._model(
                inputs_embeds=torch.zeros(stream.shape), use_cache=False
            ).logits
        return logits.float()

    def _until_last(self, visit: Visit) -> Visit:
        def stop_after(
            number: int, stream: Tensor, arguments: tuple[Any, ...], keywords: dict[str, Any]
        ) -> Tensor:
            after = visit(number, stream, arguments, keywords)
            if number == self._last:
                raise _Stopped(after)
            return after

        return stop_after

    def _inject(self, stream: Tensor, head: Callable[[Tensor], Tensor]) -> None:
        def visit(number: int, before: Tensor, *_: Any) -> Tensor:
            return stream if number == self._last else before

        self._stand_ins.visit = visit
        self._stand_ins.head = head

    def _stopped(self, **inputs: Tensor) -> Tensor:
        """Run the model until a stand-in ends the run; return the tensor that it got."""
        try:
            with self._weights.filled_when_called(self._model), torch.no_grad():
                self._model(**inputs, use_cache=False)
        except _Stopped as stopped:
            tensor: Tensor = stopped.args[0]
            return tensor
        raise cannot_run_alone(self._where, "the model does not call its last layer or its head")

    def _multiply_head(self, x: Tensor) -> Tensor:
        result = torch.empty(*x.shape[:-1], self._head_weight.shape[0])
        for begin, end in ranges(self._head_weight.shape[0], VOCABULARY_AT_ONCE):
            rows = read_finite(self._checkpoint, self._head_weight, begin, end)
            result[..., begin:end] = x @ rows.float().T
        return result


class _Stopped(Exception):
    """Ends a run; carries the result."""


def _pass(_number: int, stream: Tensor, *_: Any) -> Tensor:
    return stream


class _StandIns:
    """The behaviour of the stand-ins in the current run."""

    def __init__(self) -> None:
        self.visit: Visit = _pass
        self.embedded = torch.empty(0)
        self.head: Callable[[Tensor], Tensor] = lambda x: x


class _Station(nn.Module):
    """Replaces a decoder layer and shows its attributes."""

    def __init__(self, number: int, layer: nn.Module, stand_ins: _StandIns) -> None:
        super().__init__()
        self._number = number
        self._stand_ins = stand_ins
        # Not a submodule: the layer's weights are not this model's.
        self.__dict__["_layer"] = layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"], name)

    def forward(self, hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        return self._stand_ins.visit(self._number, hidden_states, arguments, keywords)


class _Embeddings(nn.Module):
    def __init__(self, stand_ins: _StandIns) -> None:
        super().__init__()
        self._stand_ins = stand_ins

    def forward(self, _tokens: Tensor) -> Tensor:
        return self._stand_ins.embedded


class _Head(nn.Module):
    def __init__(self, stand_ins: _StandIns) -> None:
        super().__init__()
        self._stand_ins = stand_ins

    def forward(self, x: Tensor) -> Tensor:
        return self._stand_ins.head(x)


def _path_of(model: nn.Module, part: nn.Module) -> str:
    paths: list[str] = [path for path, module in model.named_modules() if module is part]
    return paths[0]
