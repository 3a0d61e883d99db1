"""Lossy block types from weights: Q4_1, Q4_K and Q3_K.

The package gguf reads these types but has no code that writes K-quants. The searches follow ggml:
several candidates of a scale, each with least squares, and the one with the smallest error wins.
"""

import torch
from torch import Tensor

CHUNK_WEIGHTS = 1 << 16
"""Weights that are quantized at once: larger temporaries leave the processor's cache."""
_STEPS = 9
"""Candidates of a group's scale. 21 candidates, twice as slow, lessen the error by 0.3 %."""


def q4_1_blocks(weights: Tensor) -> Tensor:
    """Quantize float32 [rows, columns] to Q4_1: uint8 [rows, columns / 32 · 20]."""
    groups = weights.unflatten(1, (-1, 32))
    scale, minimum = _affine_scales(groups, 15)
    halves = torch.stack([scale, minimum], dim=2).half()
    scale, minimum = halves.float().unbind(2)
    codes = _codes(groups, scale, minimum, 15).unflatten(2, (2, 16))
    packed = codes[:, :, 0] | (codes[:, :, 1] << 4)
    return torch.cat([halves.view(torch.uint8), packed], dim=2).flatten(1)


def q4_k_blocks(weights: Tensor) -> Tensor:
    """Quantize float32 [rows, columns] to Q4_K: uint8 [rows, columns / 256 · 144]."""
    groups = weights.unflatten(1, (-1, 8, 32))
    scale, minimum = _affine_scales(groups, 15)
    # Q4_K subtracts its minimum, which is not negative.
    d, s = _six_bits(scale)
    dmin, m = _six_bits(-minimum)
    codes = _codes(groups, d.float() * s, -(dmin.float() * m), 15).unflatten(2, (4, 2))
    packed = codes[:, :, :, 0] | (codes[:, :, :, 1] << 4)
    s = s.to(torch.uint8)
    m = m.to(torch.uint8)
    head = torch.cat([d, dmin], dim=2).view(torch.uint8)
    scales = [
        s[..., :4] | (s[..., 4:] >> 4 << 6),
        m[..., :4] | (m[..., 4:] >> 4 << 6),
        (s[..., 4:] & 15) | ((m[..., 4:] & 15) << 4),
    ]
    return torch.cat([head, *scales, packed.flatten(2)], dim=2).flatten(1)


def q3_k_blocks(weights: Tensor) -> Tensor:
    """Quantize float32 [rows, columns] to Q3_K: uint8 [rows, columns / 256 · 110]."""
    groups = weights.unflatten(1, (-1, 16, 16))
    scale = _symmetric_scales(groups)
    # Scales are signed, 6 bits; the largest one becomes -32.
    largest = scale.gather(2, scale.abs().argmax(2, keepdim=True))
    d = (largest / -32).half()
    inverse = _inverse(d.float())
    s = (scale * inverse).round().clamp(-32, 31)
    codes = (groups * _inverse(d.float() * s)[..., None]).round().clamp(-4, 3) + 4
    codes = codes.to(torch.uint8).flatten(2)
    s = (s + 32).to(torch.uint8)
    low = s[..., :8] & 15 | (s[..., 8:] & 15) << 4
    quarters = (s >> 4).unflatten(2, (4, 4))
    high = _joined(quarters, 2)
    top = _joined((codes >> 2).unflatten(2, (8, 32)), 1)
    bottom = _joined((codes & 3).unflatten(2, (2, 4, 32)).movedim(2, 3).transpose(2, 3), 2, 3)
    return torch.cat([top, bottom.flatten(2), low, high, d.view(torch.uint8)], dim=2).flatten(1)


def _joined(parts: Tensor, bits: int, dim: int = 2) -> Tensor:
    """Join the parts along `dim` to bytes: part i takes `bits` bits from bit i · bits on."""
    result = parts.select(dim, 0).clone()
    for i in range(1, parts.shape[dim]):
        result |= parts.select(dim, i) << (bits * i)
    return result


def _six_bits(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return (d, codes) with d · codes near `values`, which are not negative.

    d: float16 [rows, blocks, 1]; codes: float [rows, blocks, 8], whole numbers from 0 to 63.
    """
    d = (values.amax(2, keepdim=True) / 63).half()
    return d, (values * _inverse(d.float())).round().clamp(0, 63)


def _affine_scales(groups: Tensor, max_code: int) -> tuple[Tensor, Tensor]:
    """Return (scale, minimum) of each group, minimum <= 0, for weights scale · code + minimum.

    groups: float32 [..., group size]. Errors are weighted by the weight's size plus the group's
    root mean square.
    """
    importance = groups.abs() + groups.square().mean(-1, keepdim=True).sqrt()
    fit = _Fit(groups, importance)
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    shifted = groups - low
    span = shifted.amax(-1, keepdim=True)
    scale = span[..., 0] / max_code
    minimum = low[..., 0]
    inverse = _inverse(span)
    codes = (shifted * max_code * inverse).round_()
    best = fit.error(scale, minimum, codes)
    for offset in torch.linspace(-1, 1, _STEPS).tolist():
        codes = (shifted * (max_code + offset) * inverse).round_().clamp_(0, max_code)
        fitted, fitted_minimum = fit.solve(codes)
        error = fit.error(fitted, fitted_minimum, codes)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, fitted, scale)
        minimum = torch.where(better, fitted_minimum, minimum)
    return scale, minimum


class _Fit:
    """Weighted least squares of groups by scale · code + minimum, for one set of codes at a time.

    groups, importance: float32 [..., group size].
    """

    def __init__(self, groups: Tensor, importance: Tensor) -> None:
        self._groups = groups
        self._importance = importance
        self._weighted = importance * groups
        self._sum_w = importance.sum(-1)
        self._sum_x = self._weighted.sum(-1)

    def solve(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best scale >= 0 and minimum <= 0 for `codes`, each [...].

        Equal codes determine no scale: then both are 0.
        """
        weighted_codes = self._importance * codes
        sum_l = weighted_codes.sum(-1)
        sum_l2 = (weighted_codes * codes).sum(-1)
        sum_xl = (self._weighted * codes).sum(-1)
        inverse = _inverse(self._sum_w * sum_l2 - sum_l * sum_l)
        scale = (self._sum_w * sum_xl - self._sum_x * sum_l) * inverse
        minimum = (sum_l2 * self._sum_x - sum_l * sum_xl) * inverse
        is_positive = minimum > 0
        scale = torch.where(is_positive, sum_xl * _inverse(sum_l2), scale).clamp_(min=0)
        return scale, torch.where(is_positive, 0.0, minimum)

    def error(self, scale: Tensor, minimum: Tensor, codes: Tensor) -> Tensor:
        """Return the weighted error of each group: [...]."""
        rest = torch.addcmul(minimum[..., None], codes, scale[..., None]).sub_(self._groups)
        return rest.square_().mul_(self._importance).sum(-1)


def _symmetric_scales(groups: Tensor) -> Tensor:
    """Return the scale of each group, of any sign, for weights scale · code, code from -4 to 3."""
    importance = groups.square()
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    result = torch.zeros_like(largest)
    best = torch.full_like(largest, torch.inf)
    for steps in torch.linspace(-4.9, -3.1, 13).tolist():
        codes = (groups * steps * _inverse(largest)).round().clamp(-4, 3)
        scale = (importance * groups * codes).sum(-1, keepdim=True)
        scale = scale * _inverse((importance * codes * codes).sum(-1, keepdim=True))
        error = (importance * (groups - scale * codes).square()).sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        result = torch.where(better, scale, result)
    return result[..., 0]


def _codes(groups: Tensor, scale: Tensor, minimum: Tensor, max_code: int) -> Tensor:
    """Return the nearest codes, uint8 of the shape of `groups`."""
    steps = (groups - minimum[..., None]) * _inverse(scale)[..., None]
    return steps.round().clamp(0, max_code).to(torch.uint8)


def _inverse(values: Tensor) -> Tensor:
    """Return 1 / value, and 0 for 0."""
    return torch.where(values == 0, 0.0, 1 / values)
