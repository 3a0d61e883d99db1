"""The output head over bfloat16 weights by the native kernel, in half the time of torch's product
for one token.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from loader.arithmetic import kernels
from loader.arithmetic.kernels import MAX_BF16_TOKENS


class NativeHead(nn.Linear):
    """A linear layer without bias. bfloat16 and up to MAX_BF16_TOKENS tokens: summed in float32, rounded
    once at the end.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features] in x's dtype."""
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
