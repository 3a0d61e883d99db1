"""Lossy block types from weights: Q4_1, Q4_K and Q3_K.

The package gguf reads these types but has no code that writes K-quants. The searches follow ggml:
several candidates of a scale, each with least squares, and the one with the smallest error wins.
"""

import torch
from torch import Tensor

_STEPS = 21
"""Candidates of a group's scale, from 1 below to 1 above the range's own number of steps."""


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
    low = groups.amin(-1).clamp(max=0)
    span = groups.amax(-1) - low
    scale = span / max_code
    minimum = low
    best = _error(groups, importance, scale, minimum, max_code)
    for offset in torch.linspace(-1, 1, _STEPS).tolist():
        trial = span / (max_code + offset)
        codes = _codes(groups, trial, low, max_code).float()
        fitted, offset_fitted = _least_squares(groups, importance, codes)
        error = _error(groups, importance, fitted, offset_fitted, max_code)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, fitted, scale)
        minimum = torch.where(better, offset_fitted, minimum)
    return scale, minimum


def _least_squares(groups: Tensor, importance: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (scale, minimum <= 0) with the smallest weighted error for given codes."""
    w = importance.sum(-1)
    l1 = (importance * codes).sum(-1)
    l2 = (importance * codes * codes).sum(-1)
    x = (importance * groups).sum(-1)
    xl = (importance * groups * codes).sum(-1)
    inverse = _inverse(w * l2 - l1 * l1)
    scale = (w * xl - x * l1) * inverse
    minimum = (l2 * x - l1 * xl) * inverse
    is_positive = minimum > 0
    scale = torch.where(is_positive, xl * _inverse(l2), scale)
    return scale.clamp(min=0), torch.where(is_positive, 0.0, minimum)


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


def _error(
    groups: Tensor, importance: Tensor, scale: Tensor, minimum: Tensor, max_code: int
) -> Tensor:
    codes = _codes(groups, scale, minimum, max_code).float()
    difference = scale[..., None] * codes + minimum[..., None] - groups
    return (importance * difference.square()).sum(-1)


def _inverse(values: Tensor) -> Tensor:
    """Return 1 / value, and 0 for 0."""
    return torch.where(values == 0, 0.0, 1 / values)
