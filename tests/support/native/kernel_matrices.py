"""Random packed matrices and experts, written by the tables of docs/format.md with numpy alone."""

from __future__ import annotations

import numpy as np
import torch

from loader.arithmetic import kernels

PACKINGS = {  # name: nbits, group size, scale bits, bytes of a superblock
    "tile32-q2-g16-s4": (2, 16, 4, 2560),
    "tile32-q2-g16-s8": (2, 16, 8, 3072),
    "tile32-q3-g32-s4": (3, 32, 4, 3328),
    "tile32-q3-g64-s8": (3, 64, 8, 3328),
    "tile32-q4-g64-s8": (4, 64, 8, 4352),
}


def put(codes: np.ndarray, s: np.ndarray, m: np.ndarray, name: str) -> np.ndarray:
    """Write a superblock: codes [32, 256], s and m [32, groups] (tables of docs/format.md)."""
    nbits, group, scale_bits, size = PACKINGS[name]
    parts: list[np.ndarray] = []

    def vector(columns: list[int], r: int, shift: int, mask: int = 3) -> np.ndarray:
        """64 bytes: plane v holds columns[v] .. columns[v] + 3 of rows 16r .. 16r + 15."""
        out = np.zeros((16, 4), np.uint8)
        for v, k in enumerate(columns):
            out |= (codes[16 * r : 16 * r + 16, k : k + 4] & mask).astype(np.uint8) << (shift * v)
        return out.reshape(64)

    def top(first: list[int], second: list[int], r: int) -> np.ndarray:
        out = np.zeros((16, 4), np.uint8)
        for o, columns in enumerate((first, second)):
            for v, k in enumerate(columns):
                bit = (codes[16 * r : 16 * r + 16, k : k + 4] >> 2 & 1).astype(np.uint8)
                out |= bit << (2 * v + 2 + o if v < 3 else o)
        return out.reshape(64)

    def half(a: np.ndarray, r: int) -> np.ndarray:
        return (
            a[16 * r : 16 * r + 16]
            .astype(np.int8 if a is m and scale_bits == 8 else np.uint8)
            .view(np.uint8)
        )

    if group == 16:
        for q in range(4):
            for j in range(4):
                for r in range(2):
                    parts.append(vector([64 * q + 16 * v + 4 * j for v in range(4)], r, 2))
            for r in range(2):
                sv, mv = half(s, r)[:, 4 * q : 4 * q + 4], half(m, r)[:, 4 * q : 4 * q + 4]
                parts += (
                    [(sv | mv << 4).reshape(64)]
                    if scale_bits == 4
                    else [sv.reshape(64), mv.reshape(64)]
                )
    elif group == 32:
        for q in range(2):
            for i in range(4):
                for r in range(2):
                    a, b = (
                        [128 * q + 32 * v + 4 * j for v in range(4)] for j in (2 * i, 2 * i + 1)
                    )
                    parts += [vector(a, r, 2), vector(b, r, 2), top(a, b, r)]
            for r in range(2):
                sv, mv = half(s, r)[:, 4 * q : 4 * q + 4], half(m, r)[:, 4 * q : 4 * q + 4]
                parts.append((sv | mv << 4).reshape(64))
    elif nbits == 3:
        for i in range(8):
            for r in range(2):
                a, b = ([64 * v + 4 * j for v in range(4)] for j in (2 * i, 2 * i + 1))
                parts += [vector(a, r, 2), vector(b, r, 2), top(a, b, r)]
        for r in range(2):
            parts += [half(s, r).T.reshape(64), half(m, r).T.reshape(64)]
    else:
        for h in range(2):
            for j in range(16):
                for r in range(2):
                    parts.append(vector([128 * h + 64 * v + 4 * j for v in range(2)], r, 4, 15))
            for r in range(2):
                parts += [half(a, r)[:, 2 * h : 2 * h + 2].T.reshape(32) for a in (s, m)]
    block = np.concatenate(parts)
    assert block.size == size
    return block


class Matrix:
    """Random codes and scales [rows, columns] as bytes and as float64 values."""

    def __init__(
        self, name: str, rows: int, columns: int, seed: int, extreme: bool = False
    ) -> None:
        nbits, group, scale_bits, _ = PACKINGS[name]
        rng = np.random.default_rng(seed)
        r, k = -(-rows // 32) * 32, -(-columns // 256) * 256
        low, high = (0, 16) if scale_bits == 4 else (-128, 128)
        self.name, self.rows, self.columns = name, rows, columns
        codes = rng.integers(0, 2**nbits, (r, k))
        s = rng.integers(0, 2**scale_bits, (r, k // group))
        m = rng.integers(max(low, -127), high, (r, k // group))  # formats.packing writes no -128
        if extreme:
            codes[:], s[:], m[:] = 2**nbits - 1, 2**scale_bits - 1, low if low else high - 1
        codes[rows:], s[rows:], m[rows:] = 0, 0, 0
        codes[:, columns:] = 0
        s[:, -(-columns // group) :], m[:, -(-columns // group) :] = 0, 0
        ds, dm = (rng.uniform(1e-3, 2e-3, r).astype(np.float16) for _ in range(2))
        ds[rows:], dm[rows:] = 0, 0
        self.codes, self.s, self.m, self.ds, self.dm = codes, s, m, ds, dm
        wide = lambda a: np.repeat(a, group, 1).astype(np.float64)  # noqa: E731
        values = ds[:, None].astype(np.float64) * wide(s) * codes - dm[:, None].astype(
            np.float64
        ) * wide(m)
        self.values = values[:rows, :columns]
        self.tiles: list[np.ndarray] = []
        for row in range(0, r, 32):
            head = np.concatenate(
                [a[row + 16 * h : row + 16 * h + 16] for h in range(2) for a in (ds, dm)]
            )
            blocks = [
                put(
                    codes[row : row + 32, c : c + 256],
                    s[row : row + 32, c // group :][:, : 256 // group],
                    m[row : row + 32, c // group :][:, : 256 // group],
                    name,
                )
                for c in range(0, k, 256)
            ]
            self.tiles.append(np.concatenate([head.view(np.uint8), *blocks]))
        self.bytes = np.concatenate(self.tiles)

    def tensor(self, offset: int = 0) -> torch.Tensor:
        """The bytes in a buffer of their exact size, `offset` bytes past its beginning."""
        buffer = torch.empty(self.bytes.size + offset, dtype=torch.uint8)
        buffer[offset:] = torch.from_numpy(self.bytes)
        return buffer[offset:]


def quantized(x: np.ndarray) -> np.ndarray:
    """x [T, K] fp32 as the float64 value of its int8 form, 64 columns to a scale."""
    tokens, columns = x.shape
    padded = np.zeros((tokens, -(-columns // 64) * 64), np.float32)
    padded[:, :columns] = x
    blocks = padded.reshape(tokens, -1, 64)
    amax = np.abs(blocks).max(2, keepdims=True)
    inverse = np.divide(np.float32(127), amax, out=np.zeros_like(amax), where=amax > 1e-30)
    codes = np.rint(blocks * inverse)
    values = codes.astype(np.float64) * (amax / np.float32(127)).astype(np.float64)
    return values.reshape(tokens, -1)[:, :columns]


def activations(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((tokens, columns), generator=generator)


class Expert:
    """A random expert: gate, up, down matrices and its blob."""

    def __init__(self, gate_up: str, down: str, hidden: int, intermediate: int, seed: int) -> None:
        self.gate, self.up = (Matrix(gate_up, intermediate, hidden, seed + i) for i in range(2))
        self.down = Matrix(down, hidden, intermediate, seed + 2)
        parts = [tile for pair in zip(self.gate.tiles, self.up.tiles, strict=True) for tile in pair]
        self.blob = torch.from_numpy(np.concatenate([*parts, self.down.bytes]))
        self.names = gate_up, down

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """The composition of single kernel calls and torch's silu."""
        gate = kernels.linear(x, self.gate.tensor(), self.gate.name, self.gate.rows)
        up = kernels.linear(x, self.up.tensor(), self.up.name, self.up.rows)
        h = (torch.nn.functional.silu(gate.double()).float() * up).contiguous()
        return kernels.linear(h, self.down.tensor(), self.down.name, self.down.rows)
