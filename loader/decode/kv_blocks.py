"""Blocks of a KV cache in 8 bits, by torch; docs/numerics.md describes them.

loader/native/kv_blocks.h appends the same bytes. A block holds 16 positions of one KV head: first
bfloat16 scales [groups, 16], then int8 codes, of keys [width / 2, 16, 2], of values [8, width, 2].
"""

from enum import Enum

import torch
from torch import Tensor
from torch.nn import functional

from formats.model_memory import KV_GROUP as GROUP

POSITIONS = 16
"""Positions of a block."""
WIDTH_MULTIPLE = 16
MAX_WIDTH = 1024
"""Limits of a head's width."""
_LEAST = 1e-30
"""A group whose largest magnitude is smaller counts as zero: a division must stay finite."""
_BLOCKS_AT_ONCE = 64
"""Blocks that `load` widens to float32 at a time: 4 MiB with 8 heads of 128."""


class Part(Enum):
    """The parts of a cache; they differ in the order of codes."""

    KEYS = "keys"
    VALUES = "values"


def block_bytes(width: int) -> int:
    """Return the size of a block for heads of `width` values, in bytes."""
    return _scale_bytes(width) + POSITIONS * width


def empty(batch: int, heads: int, positions: int, width: int) -> Tensor:
    """Return memory for at least `positions`, uint8 [batch, heads, blocks, bytes of a block]."""
    return torch.empty(
        (batch, heads, -(-positions // POSITIONS), block_bytes(width)),
        dtype=torch.uint8,
        device="cpu",
    )


def store(blocks: Tensor, begin: int, rows: Tensor, part: Part) -> None:
    """Quantize `rows` [batch, heads, n, width] and write them as positions `begin` and later.

    Codes after the last row of its block become 0.
    """
    width = rows.shape[-1]
    codes, scales = _quantized(rows)
    first, slot = divmod(begin, POSITIONS)
    after = -(begin + rows.shape[2]) % POSITIONS
    target = blocks[:, :, first : (begin + rows.shape[2] + after) // POSITIONS]
    if slot:
        old_codes, old_scales = _unpacked(target[:, :, :1], width, part)
        codes = torch.cat((old_codes[:, :, :slot], codes), 2)
        scales = torch.cat((old_scales[:, :, :slot], scales), 2)
    codes = functional.pad(codes, (0, 0, 0, after))
    scales = functional.pad(scales, (0, 0, 0, after))
    code_view, scale_view = _views(target, width, part)
    code_view.copy_(codes.view(code_view.shape))
    scale_view.copy_(scales.unflatten(2, (-1, POSITIONS)))


def load(blocks: Tensor, length: int, width: int, part: Part, dtype: torch.dtype) -> Tensor:
    """Return the first `length` positions, code times scale, [batch, heads, length, width]."""
    batch, heads = blocks.shape[:2]
    out = torch.empty((batch, heads, length, width), dtype=dtype, device=blocks.device)
    step = _BLOCKS_AT_ONCE * POSITIONS
    for begin in range(0, length, step):
        end = min(length, begin + step)
        some = blocks[:, :, begin // POSITIONS : -(-end // POSITIONS)]
        codes, scales = _unpacked(some, width, part)
        wide = scales.float().repeat_interleave(GROUP, -1)[..., :width]
        out[:, :, begin:end] = (codes * wide)[:, :, : end - begin]
    return out


def _scale_bytes(width: int) -> int:
    return -(-width // GROUP) * POSITIONS * torch.bfloat16.itemsize


def _quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes, int8 like `rows`, and scales, bfloat16 [batch, heads, n, groups]."""
    width = rows.shape[-1]
    groups = functional.pad(rows.float(), (0, -width % GROUP)).unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1)
    scales = (largest / 127).to(torch.bfloat16)
    scales = torch.where(largest < _LEAST, 0.0, scales)
    scales = torch.where(groups.isfinite().all(-1), scales, torch.nan)
    # A scale may have been rounded down: then the largest value exceeds 127.
    codes = (groups / scales.float()[..., None]).round_().clamp_(-127, 127)
    codes = torch.where((scales > 0)[..., None], codes, 0.0).to(torch.int8)
    return codes.flatten(-2)[..., :width].contiguous(), scales


def _views(blocks: Tensor, width: int, part: Part) -> tuple[Tensor, Tensor]:
    """Return views of codes and scales with the positions before the head's width.

    Codes of keys: [batch, heads, blocks, 16, width / 2, 2]; of values:
    [batch, heads, blocks, 8, 2, width]. Scales: [batch, heads, blocks, 16, groups].
    """
    size = _scale_bytes(width)
    codes = blocks[..., size:].view(torch.int8)
    if part is Part.KEYS:
        codes = codes.unflatten(-1, (width // 2, POSITIONS, 2)).transpose(-3, -2)
    else:
        codes = codes.unflatten(-1, (POSITIONS // 2, width, 2)).transpose(-2, -1)
    scales = blocks[..., :size].view(torch.bfloat16).unflatten(-1, (-1, POSITIONS))
    return codes, scales.transpose(-2, -1)


def _unpacked(blocks: Tensor, width: int, part: Part) -> tuple[Tensor, Tensor]:
    """Return codes [batch, heads, positions, width] and scales [batch, heads, positions, groups].

    They are copies, of all positions of the blocks.
    """
    codes, scales = _views(blocks, width, part)
    batch, heads, count = blocks.shape[:3]
    shape = (batch, heads, count * POSITIONS, -1)
    return codes.reshape(*shape[:3], width), scales.reshape(shape)
