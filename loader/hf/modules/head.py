"""The output head over bfloat16 weights by the native kernel, in half the time of torch's product
for one token.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from loader.arithmetic import kernels

FEW_TOKENS = 8
"""Up to here the native kernel reads the weights once; with more tokens torch's blocked product
wins.
"""


class NativeHead(nn.Linear):
    """A linear layer without bias. bfloat16 and up to FEW_TOKENS tokens: summed in float32, rounded
    once at the end.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features] in x's dtype."""
        weight = self.weight
        tokens = x.numel() // self.in_features
        if (
            weight.dtype is not torch.bfloat16
            or x.dtype is not torch.bfloat16
            or not 0 < tokens <= FEW_TOKENS
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
