"""An original model's predictions, computed layer by layer on a machine that cannot hold it.

Memory holds one layer's weights without its experts', slices of one expert, and the activations of
a part of the windows. Three temporary files hold the activations of all windows, 12 · hidden_size
bytes per token; the kernel may keep them in its page cache.
"""

import errno
import itertools
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from converter.checkpoint.source import Checkpoint
from converter.forward.expert_forward import ExpertForward
from converter.forward.layer_forward import LayerForward
from converter.forward.layer_loop import LayerLoop, LayerWork, Steps
from converter.forward.loaded_layer import Routed
from converter.forward.ordered_tasks import one_by_one
from formats.errors import DoesNotFitError, SourceError
from formats.files.io_errors import io_error
from formats.prediction import Prediction

TOKENS_AT_ONCE = 4096
"""Tokens that go through an expert together, or through a layer; at least one window."""


class StreamedModel:
    """Float32 predictions of the model in `checkpoint` for `windows`, int64 [n, window].

    Raises SourceError with the layer if activations are infinite or NaN, and for a token without an
    embedding; DoesNotFitError if the disk has no room for the activations.
    """

    def __init__(self, checkpoint: Checkpoint, windows: Tensor) -> None:
        vocabulary = checkpoint.architecture.vocab_size
        largest = int(windows.max())
        if largest >= vocabulary:
            raise SourceError(
                f"{checkpoint.folder}: the tokenizer gives token {largest}, the model has a"
                f" vocabulary of {vocabulary}",
                "use the checkpoint with its own tokenizer",
            )
        self._windows = windows
        self._forward = LayerForward(checkpoint)
        hidden = self._forward.hidden_size
        self._stream = _in_a_file((*windows.shape, hidden))
        self._files = _ReusedFiles([_in_a_file((windows.numel(), hidden)) for _ in range(2)])
        self._steps = Steps(max(1, TOKENS_AT_ONCE // windows.shape[1]), TOKENS_AT_ONCE, experts=1)
        self._loop = LayerLoop(
            checkpoint, self._forward, self._steps, one_by_one, self._files.allocate
        )
        self._work = _Choices(self._forward.experts)

    def run(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Take the windows through all layers. progress: called with (layers done, all layers)."""
        self._forward.embed(self._windows, self._stream, self._steps.windows)
        for layer in range(self._forward.layers):
            self._loop.pass_layer(layer, self._stream, self._work)
            if progress:
                progress(layer + 1, self._forward.layers)

    def predictions(self) -> Iterator[Prediction]:
        """Yield the prediction of each window, after `run`.

        logits(begin, end): of these positions, float32 [end - begin, vocabulary]. The experts that
        the tokens chose: int64 [layers with experts, window, k].
        """
        window = self._windows.shape[1]
        chosen = torch.stack(self._work.chosen)
        for number, stream in enumerate(self._stream):
            routers = chosen[:, number * window : (number + 1) * window]
            yield Prediction(partial(self._logits, stream), routers)

    def _logits(self, stream: Tensor, begin: int, end: int) -> Tensor:
        return self._forward.logits(stream[begin:end])


class _Choices(LayerWork):
    """Records the tokens' experts: per layer with experts, int64 [tokens, k]."""

    def __init__(self, experts: ExpertForward) -> None:
        super().__init__(experts)
        self.chosen: list[Tensor] = []

    def take_routed(self, routed: Routed) -> None:
        self.chosen.append(routed.chosen)


class _ReusedFiles:
    """Tensors in files, handed out in turn: in each layer the loop allocates each of them once."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self._turns = itertools.cycle(tensors)

    def allocate(self, shape: tuple[int, ...]) -> Tensor:
        """Return the next tensor, zeroed."""
        return next(self._turns).view(shape).zero_()


def _in_a_file(shape: tuple[int, ...]) -> Tensor:
    """Return float32 zeros in a temporary file without a name."""
    n_bytes = 4 * math.prod(shape)
    with tempfile.TemporaryFile() as file:
        try:
            # Allocate now: a full disk met later, through the mapping, would kill the process.
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
