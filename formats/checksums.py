"""Checksums of stored bytes: sha256 identifies them, xxh3 finds damage at memory speed."""

import hashlib
from typing import Any, NamedTuple

import xxhash

CHECKS = ("fast", "sha256", "none")
"""Checks of an expert at each read: its xxh3, its sha256, or no check."""


class Checksums(NamedTuple):
    """Both checksums, in lower-case hexadecimal: 64 and 32 digits."""

    sha256: str
    xxh3: str

    @classmethod
    def from_bytes(cls, data: Any) -> "Checksums":
        """Compute both checksums of bytes or of a contiguous buffer."""
        return cls(sha256_of(data), xxh3_of(data))


def sha256_of(data: Any) -> str:
    """Return the sha256 of bytes or of a contiguous buffer, in hex."""
    return hashlib.sha256(data).hexdigest()


def xxh3_of(data: Any) -> str:
    """Return the 128-bit XXH3 of bytes or of a contiguous buffer, in hex.

    Unlike sha256, it does not detect deliberate changes.
    """
    return xxhash.xxh3_128_hexdigest(data)
