"""One token's way through a whole model whose experts are all in RAM: one native call, Python only where one is new."""

from collections.abc import Sequence
from ctypes import addressof, byref, c_char, c_float, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loader.cache import ExpertSource
from loader.copies import Derived
from loader.growing_cache import GrowingLayer
from loader.kernels import PackedMatrix, packed_bytes
from loader.layer_step import LayerStep
from loader.native_library import Matrix, Model, Token, library

_MISSING = 6
_HEAD_BF16 = -1


@dataclass(frozen=True)
class ModelWeights:
    """The weights outside of the layers, dense: embedding [vocabulary, hidden] and norm [hidden] of the
    activations' dtype, RMSNorm's eps; the head bfloat16 [rows, hidden], packed, or None: it stays outside."""

    embedding: Tensor
    norm: Tensor
    eps: float
    head: Tensor | PackedMatrix | None

    def fit(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether they are as said above, and on `device`."""
        parts = self._tensors()
        return self.embedding.dtype is self.norm.dtype is dtype and all(
            part.is_contiguous() and part.device == device for part in parts
        )

    def addresses(self) -> list[int]:
        """Where they lie, after the number of embeddings: fewer may lie at the same place."""
        return [len(self.embedding), *(part.data_ptr() for part in self._tensors())]

    def detached(self) -> "ModelWeights":
        """The same memory, kept whatever becomes of the parameters."""
        head = self.head.detach() if isinstance(self.head, Tensor) else self.head
        return ModelWeights(self.embedding.detach(), self.norm.detach(), self.eps, head)

    def _tensors(self) -> list[Tensor]:
        head = self.head.tiles if isinstance(self.head, PackedMatrix) else self.head
        return [self.embedding, self.norm] + ([] if head is None else [head])


class TokenStep(Derived):
    """A model's weights and sizes, checked once; keeps the weights alive, and the experts that it has used.

    ValueError if they do not fit together.
    """

    def __init__(self, layers: Sequence[LayerStep], weights: ModelWeights) -> None:
        first = layers[0].structure
        self._layers, self._weights = layers, weights.detached()
        self._addresses = weights.addresses()
        self.dtype, self.experts = layers[0].attention.dtype, first.experts
        self.vocabulary, self.has_head = weights.embedding.shape[0], weights.head is not None
        hidden = first.attention.hidden
        for layer in layers:
            same = (layer.structure.attention.hidden, layer.structure.experts, layer.structure.top_k)
            if same != (hidden, first.experts, first.top_k) or layer.attention.dtype is not self.dtype:
                raise ValueError("layers of several sizes")
        for tensor, columns in ((weights.embedding, weights.embedding.shape[1]), (weights.norm, weights.norm.numel())):
            if tensor.dtype is not self.dtype or columns != hidden or not tensor.is_contiguous():
                raise ValueError(f"expected dense {self.dtype} of {hidden}, got {tensor.shape} {tensor.dtype}")
        head = _head(weights.head, hidden)
        self._wide = head.rows if weights.head is not None else hidden
        count = len(layers)
        self._structures = (c_void_p * count)(*(addressof(layer.structure) for layer in layers))
        self._blobs = (c_void_p * (count * self.experts))()
        self._held: dict[tuple[int, int], Tensor] = {}
        self._model = Model(
            layers=addressof(self._structures),
            blobs=addressof(self._blobs),
            embedding=weights.embedding.data_ptr(),
            norm=weights.norm.data_ptr(),
            vocabulary=weights.embedding.shape[0],
            head=head,
            eps=weights.eps,
            count=count,
        )
        self._top_k = first.top_k
        self._room = c_char * (3 * hidden * self.dtype.itemsize)
        self._pointers, self._sizes = c_void_p * count, c_int64 * count
        self._index, self._scores = c_int64 * (count * first.top_k), c_float * (count * first.top_k)
        self._run = library().moe_token_step

    def is_of(self, layers: Sequence[LayerStep], weights: ModelWeights) -> bool:
        """Whether it was made of these, at the places where they are now."""
        return layers == self._layers and weights.addresses() == self._addresses and weights.eps == self._weights.eps

    def run(
        self, token: int, cos: Tensor, sin: Tensor, row: int, past: Sequence[GrowingLayer], experts: ExpertSource
    ) -> Tensor:
        """As `loader.token_forward.Step.run`. Experts are asked for by rank, in the order of layers, with room for all
        of them: each is used where it first was."""
        count, length = len(self._layers), past[0].get_seq_length()
        keys, values, capacity = self._pointers(), self._pointers(), self._sizes()
        for number, (layer, step) in enumerate(zip(past, self._layers, strict=True)):
            keys[number], values[number], capacity[number] = layer.place(step.attention.kind)
        width = self._layers[0].attention.structure.head_dim
        if not (cos.dtype is sin.dtype is self.dtype and cos.shape == sin.shape and cos.shape[-1] == width):
            raise ValueError(f"rotary embedding of {self.dtype} [{width}]: got {cos.dtype} {tuple(cos.shape)}")
        offset = row * width * self.dtype.itemsize
        index, scores, room = self._index(), self._scores(), self._room()
        # The device is named: native code writes there, whatever torch's default device is.
        out = torch.empty((1, 1, self._wide), dtype=self.dtype, device="cpu")
        state = Token(
            token, cos.data_ptr() + offset, sin.data_ptr() + offset, addressof(keys), addressof(values),
            addressof(capacity), length, addressof(room), addressof(index), addressof(scores), out.data_ptr(),
        )  # fmt: skip
        asked = 0
        while error := self._run(byref(self._model), byref(state)):
            if error != _MISSING:
                raise ValueError(f"native model: error {error} at position {length}, token {token}")
            asked = self._ask(experts, index, asked, state.halves_done // 2 + 1)
        self._ask(experts, index, asked, count)
        for layer in past:
            layer.show(length + 1)
        return out

    def _ask(self, experts: ExpertSource, index: Any, begin: int, end: int) -> int:
        """Asks for the chosen experts of layers [begin, end) and keeps those that are new; gives `end`."""
        top_k, held = self._top_k, self._held
        for number in range(begin, end):
            chosen = index[number * top_k : (number + 1) * top_k]
            if all((number, expert) in held for expert in chosen):
                experts.used_again(number, top_k)
                continue
            with experts.lease(number, chosen) as lease:
                for expert, blob in lease.all().items():
                    if (number, expert) not in held:
                        # Never exchanged: another thread may be reading the bytes.
                        self._blobs[number * self.experts + expert] = self._layers[number].address(expert, blob)
                        # At last: what is held is not asked for again, though an interrupt came between.
                        held[number, expert] = blob
        return end


def _head(head: Tensor | PackedMatrix | None, hidden: int) -> Matrix:
    if head is None:
        return Matrix()
    if isinstance(head, Tensor):
        if head.dtype is not torch.bfloat16 or head.shape[1:] != (hidden,) or not head.is_contiguous():
            raise ValueError(f"head of dense bfloat16 [rows, {hidden}]: got {tuple(head.shape)} {head.dtype}")
        return Matrix(tiles=head.data_ptr(), rows=head.shape[0], packing=_HEAD_BF16)
    if head.tiles.numel() < packed_bytes(head.packing, head.rows, hidden):
        raise ValueError(f"head: {head.tiles.numel()} bytes are too few for {head.rows} x {hidden}")
    packing = library().moe_packing_id(head.packing.encode())
    return Matrix(tiles=head.tiles.data_ptr(), rows=head.rows, packing=packing)
