"""An original's predictions, computed layer by layer, for comparison with its conversion on a smaller machine.

In memory are one layer's attention or slices of one expert, and pieces of the activations. The activations of all
windows stand in two temporary files, 8 · hidden_size bytes a token, which the system may keep in memory or not.
"""

import errno
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from converter.bad_weights import overflow_error
from converter.layer_forward import LayerForward
from converter.source import Checkpoint
from formats.errors import DoesNotFitError, SourceError
from formats.io_errors import io_error

TOKENS_AT_ONCE = 4096
"""That go through an expert together; as many windows as are in them, but at least one, through attention."""

Prediction = tuple[Callable[[int, int], Tensor], Tensor]


class StreamedModel:
    """Predictions of the model in `checkpoint` for `windows` (int64 [n, window]), in float32.

    Raises SourceError naming the layer if activations are not finite, or if the windows have tokens that the model
    has no embedding for; DoesNotFitError if there is no room for the activations.
    """

    def __init__(self, checkpoint: Checkpoint, windows: Tensor) -> None:
        a = checkpoint.architecture
        if int(windows.max()) >= a.vocab_size:
            raise SourceError(
                f"{checkpoint.folder}: the tokenizer gives token {int(windows.max())}, the model has a vocabulary of"
                f" {a.vocab_size}",
                "use the checkpoint with its own tokenizer",
            )
        self._checkpoint = checkpoint
        self._windows = windows
        self._forward = LayerForward(checkpoint)
        shape = (windows.numel(), a.hidden_size)
        self._stream, self._after = _in_a_file(shape), _in_a_file(shape)
        self._chosen = torch.empty(a.num_hidden_layers, windows.numel(), a.num_experts_per_tok, dtype=torch.int64)

    @torch.inference_mode()
    def run(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Takes the windows through all layers; `progress` is called with (done layers, all layers)."""
        layers = self._checkpoint.architecture.num_hidden_layers
        self._forward.embed(self._windows.flatten(), self._stream)
        for layer in range(layers):
            self._attention(layer)
            self._experts(layer)
            self._stream, self._after = self._after, self._stream
            if progress:
                progress(layer + 1, layers)

    def predictions(self) -> Iterator[Prediction]:
        """Of each window, after `run`: a function (begin, end) → logits, float32 [end - begin, vocabulary], of these
        positions; and the experts that the routers chose, int64 [layers, window, k]."""
        window = self._windows.shape[1]
        for begin in range(0, self._windows.numel(), window):
            hidden = self._stream[begin : begin + window]
            yield partial(self._logits, hidden), self._chosen[:, begin : begin + window]

    @torch.inference_mode()
    def _logits(self, hidden: Tensor, begin: int, end: int) -> Tensor:
        return self._forward.logits(hidden[begin:end])

    def _attention(self, layer: int) -> None:
        """Adds the layer's attention to the stream."""
        window = self._windows.shape[1]
        stream = self._stream.view(*self._windows.shape, -1)
        attention = self._forward.attention(layer, window)
        step = max(1, TOKENS_AT_ONCE // window)
        for begin in range(0, len(stream), step):
            part = stream[begin : begin + step]
            part.copy_(attention(part)[0])

    def _experts(self, layer: int) -> None:
        """The stream with the layer's experts added, in `_after`: each expert has the stream before them as input."""
        norm = self._forward.norm(f"model.layers.{layer}.post_attention_layernorm.weight")
        router = self._forward.router(layer)
        chosen, scores = self._chosen[layer], torch.empty(self._chosen[layer].shape)
        for part in torch.split(torch.arange(len(chosen)), TOKENS_AT_ONCE):
            self._check(self._stream[part], layer, "after attention")
            *_, scores[part], chosen[part] = router(norm(self._stream[part]))
        self._after.copy_(self._stream)
        for expert in range(self._checkpoint.architecture.num_local_experts):
            tokens, place = torch.where(chosen == expert)
            for rows, column in zip(*(torch.split(x, TOKENS_AT_ONCE) for x in (tokens, place)), strict=True):
                output = self._forward.expert(layer, expert, norm(self._stream[rows]))
                self._check(output, layer, f"expert {expert}")
                self._after.index_add_(0, rows, output.mul_(scores[rows, column, None]))

    def _check(self, values: Tensor, layer: int, where: str) -> None:
        if not bool(torch.isfinite(values).all()):
            raise overflow_error(self._checkpoint, layer, f"layer {layer}: {where}")


def _in_a_file(shape: tuple[int, ...]) -> Tensor:
    """float32 zeros in a temporary file that has no name."""
    n_bytes = 4 * math.prod(shape)
    with tempfile.TemporaryFile() as file:
        try:
            # All of it now: a full disk met later, through the mapping, would kill the process.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, n_bytes)
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise io_error(e, tempfile.gettempdir(), "used for the activations") from e
            raise DoesNotFitError(
                f"{tempfile.gettempdir()}: no room for {n_bytes} bytes of activations",
                "name another folder in TMPDIR, or compare fewer windows: --max-windows",
            ) from None
        return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=shape))
