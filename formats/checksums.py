"""The two checksums of stored bytes: sha256 is their identity, xxh3 finds damage at the speed of
memory.
"""

import hashlib
from typing import Any, NamedTuple

import xxhash

CHECKS = ("fast", "sha256", "none")
"""What a reader compares as it reads experts: their xxh3, their sha256, or nothing."""


class Checksums(NamedTuple):
    """Both, in lower-case hexadecimal: 64 and 32 digits."""

    sha256: str
    xxh3: str

    @classmethod
    def of(cls, data: Any) -> "Checksums":
        """Of `data`: bytes, or a contiguous buffer."""
        return cls(sha256_of(data), xxh3_of(data))


def sha256_of(data: Any) -> str:
    """The sha256 of bytes or of a contiguous buffer, in hex."""
    return hashlib.sha256(data).hexdigest()


def xxh3_of(data: Any) -> str:
    """The 128-bit XXH3 of bytes or of a contiguous buffer, in hex. Not secure against a forger, as
    sha256 is.
    """
    return xxhash.xxh3_128_hexdigest(data)
