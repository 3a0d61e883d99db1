"""The bits inside a superblock: codes, S and M as bytes (docs/format.md, "Tiles").

Comments name the axes of a tensor. A tile has 2 halves of 16 rows and a row of superblocks
("block"), a superblock has chunks, a chunk has planes: groups that share code bytes. A code vector
has 4 bytes a row ("byte").
"""

import torch
from torch import Tensor

from formats.packing import HALF_ROWS


def pack_codes(codes: Tensor, nbits: int) -> Tensor:
    """[tile, half, row, block, chunk, plane, vector, 4] -> [tile, block, chunk, bytes]."""
    if nbits == 4:
        vectors = codes[..., 0, :, :] | (codes[..., 1, :, :] << 4)
    else:
        low = codes & 3
        vectors = low[..., 0, :, :]
        for plane in (1, 2, 3):
            vectors = vectors | (low[..., plane, :, :] << (2 * plane))
    if nbits != 3:
        # -> tile, block, chunk, vector, half, row, byte
        return vectors.permute(0, 3, 4, 5, 1, 2, 6).flatten(3)
    pairs = torch.unflatten(vectors, -2, (-1, 2))
    high = _high_bits(codes)
    triples = torch.cat([pairs, high.unsqueeze(-2)], dim=-2)  # [..., pair, 3, 4]
    # -> tile, block, chunk, pair, half, 3, row, byte
    return triples.permute(0, 3, 4, 5, 1, 6, 2, 7).flatten(3)


def unpack_codes(body: Tensor, nbits: int, vectors: int) -> Tensor:
    """Invert `pack_codes` for chunks of `vectors` code vectors in each half."""
    if nbits == 3:
        triples = torch.unflatten(body, 3, (vectors // 2, 2, 3, HALF_ROWS, 4))
        # -> tile, half, row, block, chunk, pair, 3, byte
        triples = triples.permute(0, 4, 6, 1, 2, 3, 5, 7)
        low = triples[..., :2, :].flatten(-3, -2)
        high = triples[..., 2, :]
    else:
        low = torch.unflatten(body, 3, (vectors, 2, HALF_ROWS, 4))
        # -> tile, half, row, block, chunk, vector, byte
        low = low.permute(0, 4, 5, 1, 2, 3, 6)
    if nbits == 4:
        return torch.stack([low & 15, low >> 4], dim=5)
    planes = [(low >> (2 * plane)) & 3 for plane in range(4)]
    if nbits == 3:
        for plane in range(4):
            bits = [(high >> _high_bit(plane, odd)) & 1 for odd in (0, 1)]
            top = torch.stack(bits, dim=-2).flatten(-3, -2)
            planes[plane] = planes[plane] | (top << 2)
    return torch.stack(planes, dim=5)


def pack_scales(s: Tensor, m: Tensor, scale_bits: int, row_major: bool) -> Tensor:
    """S and M, each [tile, half, row, block, chunk, plane] -> [tile, block, chunk, bytes].

    Both are uint8, M in two's complement. With 4 bits, S and M share a byte.
    """
    kinds = (s | (m << 4)).unsqueeze(-1) if scale_bits == 4 else torch.stack([s, m], dim=-1)
    inner = (2, 5) if row_major else (5, 2)
    # -> tile, block, chunk, half, kind, then row and plane
    return kinds.permute(0, 3, 4, 1, 6, *inner).flatten(3)


def unpack_scales(
    scales: Tensor, scale_bits: int, planes: int, row_major: bool
) -> tuple[Tensor, Tensor]:
    """Invert `pack_scales`: S is uint8; M is uint8 for nibbles and int8 for bytes."""
    kinds = 1 if scale_bits == 4 else 2
    # -> kind, tile, half, row, block, chunk, plane
    if row_major:
        order = torch.unflatten(scales, 3, (2, kinds, HALF_ROWS, planes))
        order = order.permute(4, 0, 3, 5, 1, 2, 6)
    else:
        order = torch.unflatten(scales, 3, (2, kinds, planes, HALF_ROWS))
        order = order.permute(4, 0, 3, 6, 1, 2, 5)
    if scale_bits == 4:
        return order[0] & 15, order[0] >> 4
    return order[0], order[1].contiguous().view(torch.int8)


def _high_bits(codes: Tensor) -> Tensor:
    """Top bits of 3-bit codes, one byte for two code vectors: [..., row, ..., pair, 4]."""
    top = torch.unflatten(codes >> 2, -2, (-1, 2))
    high = torch.zeros_like(top[..., 0, :, 0, :])
    for plane in range(4):
        for odd in (0, 1):
            high |= top[..., plane, :, odd, :] << _high_bit(plane, odd)
    return high


def _high_bit(plane: int, odd: int) -> int:
    """Bit position of a top bit. `odd`: the first or second code vector of the pair."""
    return 2 * plane + 2 + odd if plane < 3 else odd
