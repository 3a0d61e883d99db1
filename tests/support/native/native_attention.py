"""Native attention of one token, called as the decoder calls it, without the rest of a model."""

from ctypes import byref

import torch

from loader.arithmetic.native_library import KvCache, library
from loader.decode.native_structures import attention_structure
from loader.decode.weights import LayerWeights


class NativeAttention:
    """weights: `AttentionWeights`; they stay alive with this."""

    def __init__(self, weights, hidden, head_dim, scale, dtype):
        nothing = torch.empty(0)
        layer = LayerWeights(weights, head_dim, scale, nothing, 0.0, nothing, 0.0, nothing, 0, {})
        self._layer, self._dtype = layer, dtype
        self._structure = attention_structure(layer, hidden, dtype)
        self.kind = weights.k.rows // head_dim, head_dim, dtype, torch.device("cpu")

    def append(self, x, cos, sin, past):
        """x [1, 1, hidden], cos and sin [1, 1, head_dim] -> like x; `past`, a GrowingLayer or an
        EightBitLayer, is one longer then.
        """
        length = past.get_seq_length()
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        assert x.dtype is cos.dtype is sin.dtype is self._dtype
        keys, values, capacity = past.place(self.kind)
        out = torch.empty_like(x)
        cache = KvCache(keys, values, capacity, length, int(past.is_8bit))
        addresses = x.data_ptr(), cos.data_ptr(), sin.data_ptr(), byref(cache)
        error = library().moe_attention_step(byref(self._structure), *addresses, out.data_ptr())
        assert error == 0
        past.show(length + 1)
        return out
