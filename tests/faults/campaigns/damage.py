"""Damage to files, as disks, cables and people cause it."""

import random
from pathlib import Path

BLOCK_BYTES = 4096


def damage(path: Path, state: random.Random) -> str:
    """Damage or remove a file. Return the kind of damage."""
    data = path.read_bytes()
    kind = state.choice(("bit", "zeros", "other block", "cut", "longer", "removed"))
    if kind == "removed":
        path.unlink()
    else:
        path.write_bytes(damaged(data, kind, state))
    return kind


def damaged(data: bytes, kind: str, state: random.Random) -> bytes:
    """Return damaged `data`; it differs unless it is empty.

    kind: bit, digit, zeros, other block, cut, longer, line (one less, one twice, or two swapped).
    """
    if not data:
        return b"\0"
    changed = bytearray(data)
    at = state.randrange(len(data))
    if kind == "cut":
        return data[:at]
    if kind == "longer":
        return data + state.randbytes(state.randint(1, 2 * BLOCK_BYTES))
    if kind == "line":
        return other_lines(data, state)
    if kind == "digit" and (digits := [i for i, byte in enumerate(data) if chr(byte).isdigit()]):
        at = state.choice(digits)
        changed[at] = state.choice([byte for byte in b"0123456789" if byte != data[at]])
    elif kind == "zeros" and any(data[at : at + BLOCK_BYTES]):
        changed[at : at + BLOCK_BYTES] = bytes(len(data[at : at + BLOCK_BYTES]))
    elif kind == "other block" and len(data) > 2 * BLOCK_BYTES:
        at, other = (state.randrange(len(data) // BLOCK_BYTES) * BLOCK_BYTES for _ in range(2))
        changed[at : at + BLOCK_BYTES] = data[other : other + BLOCK_BYTES]
    if changed == data:
        changed[at] ^= 1 << state.randrange(8)
    return bytes(changed)


def other_lines(data: bytes, state: random.Random) -> bytes:
    """`data` with one line less, one line twice, or two lines swapped."""
    lines = data.splitlines(keepends=True)
    one, other = state.randrange(len(lines)), state.randrange(len(lines))
    kind = state.choice(("less", "twice", "swapped"))
    if kind == "less":
        del lines[one]
    elif kind == "twice":
        lines.insert(other, lines[one])
    else:
        lines[one], lines[other] = lines[other], lines[one]
    return b"".join(lines)
