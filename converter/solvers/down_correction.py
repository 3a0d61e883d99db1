"""Down, fitted to what reaches it: the activations that the quantized gate and up give, towards the
original's outputs.

With h the original's inner activations and h' those after quantization, the W' for which W'h' is
nearest to W h is W + W·D·(H' + λ)⁻¹, D = Σ (h - h')·h'ᵀ, H' = Σ h'·h'ᵀ; in blocks of columns, as
down's statistics are. Nothing beyond the expert is needed for it (docs/quality.md has what it
buys).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CORRECTION_DAMPING = 0.05
"""Of the mean diagonal of H'."""


@dataclass(frozen=True)
class DownCorrection:
    """factor: float32 [blocks, width, width], D·(H' + λ)⁻¹ of each block of columns."""

    factor: Tensor

    @classmethod
    def of(cls, difference: Tensor, moment: Tensor) -> "DownCorrection | None":
        """From D and H', float32 [blocks, width, width] each; None where they are not finite."""
        damped = moment.double()
        diagonal = damped.diagonal(dim1=1, dim2=2)
        added = CORRECTION_DAMPING * diagonal.mean(1, keepdim=True)
        diagonal += torch.where(added > 0, added, 1.0)
        if not bool(torch.isfinite(damped).all() and torch.isfinite(difference).all()):
            return None
        # H' is symmetric: D·A⁻¹ is the transpose of A⁻¹·Dᵀ.
        solved = torch.linalg.solve(damped, difference.double().transpose(1, 2))
        return cls(solved.transpose(1, 2).float().contiguous())

    def apply(self, weight: Tensor) -> Tensor:
        """The corrected rows, float32, of rows [n, columns] of down."""
        blocks, width, _ = self.factor.shape
        rows, columns = weight.shape
        padded = torch.nn.functional.pad(weight.float(), (0, blocks * width - columns)).view(
            rows, blocks, width
        )
        moved = torch.bmm(padded.transpose(0, 1), self.factor).transpose(0, 1)
        return (padded + moved).reshape(rows, -1)[:, :columns].contiguous()
