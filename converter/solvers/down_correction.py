"""Correction of an expert's down matrix for the errors of its quantized gate and up.

h is the original's inner activations, h' those after gate and up are quantized. The W' whose
outputs W'h' are nearest to W h is W + W·D·(H' + λ)⁻¹, with D = Σ (h - h')·h'ᵀ and H' = Σ h'·h'ᵀ.
It is computed in blocks of columns, as the statistics of down are. It needs no tensor outside the
expert. docs/quality.md has the gain.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CORRECTION_DAMPING = 0.05
"""λ as a share of the mean diagonal of H'."""


@dataclass(frozen=True)
class DownCorrection:
    """factor: D·(H' + λ)⁻¹ of each block of columns, float32 [blocks, width, width]."""

    factor: Tensor

    @classmethod
    def solve(cls, difference: Tensor, moment: Tensor) -> "DownCorrection | None":
        """Return the correction for D and H', or None if they are not finite.

        difference, moment: float32 [blocks, width, width].
        """
        damped = moment.double()
        diagonal = damped.diagonal(dim1=1, dim2=2)
        added = CORRECTION_DAMPING * diagonal.mean(1, keepdim=True)
        diagonal += torch.where(added > 0, added, 1.0)
        if not bool(torch.isfinite(damped).all() and torch.isfinite(difference).all()):
            return None
        # H' is symmetric, so D·A⁻¹ is the transpose of A⁻¹·Dᵀ.
        solved = torch.linalg.solve(damped, difference.double().transpose(1, 2))
        return cls(solved.transpose(1, 2).float().contiguous())

    def apply(self, weight: Tensor) -> Tensor:
        """Return corrected rows of down, float32 [n, columns], for its rows [n, columns]."""
        blocks, width, _ = self.factor.shape
        rows, columns = weight.shape
        padded = torch.nn.functional.pad(weight.float(), (0, blocks * width - columns))
        by_block = padded.view(rows, blocks, width)
        change = torch.bmm(by_block.transpose(0, 1), self.factor).transpose(0, 1)
        return (by_block + change).reshape(rows, -1)[:, :columns].contiguous()
