"""The output head over bfloat16 weights. For one token the native kernel halves torch's time."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from loader.arithmetic import kernels
from loader.arithmetic.kernels import MAX_BF16_TOKENS


class NativeHead(nn.Linear):
    """A linear layer without bias that uses the native kernel for few tokens.

    The kernel takes bfloat16 inputs and up to MAX_BF16_TOKENS tokens. It sums in float32 and rounds
    once at the end.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out_features] in x's dtype for x [..., in_features]."""
        weight = self.weight
        tokens = x.numel() // self.in_features
        if (
            weight.dtype is not torch.bfloat16
            or x.dtype is not torch.bfloat16
            or not 0 < tokens <= MAX_BF16_TOKENS
            or torch.is_grad_enabled()
            or self.bias is not None
            or not weight.is_contiguous()
            or x.device.type != "cpu"
        ):
            return functional.linear(x, weight, self.bias)
        result = kernels.linear_bf16(
            x.reshape(tokens, self.in_features).float().contiguous(), weight
        )
        return result.to(x.dtype).view(*x.shape[:-1], self.out_features)
