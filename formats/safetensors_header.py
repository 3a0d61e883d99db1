"""Headers of safetensors files: strict reading, and writing with aligned data sections."""

import hashlib
import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from formats import ALIGNMENT_BYTES
from formats.config.strict_json import parse
from formats.errors import DamageError, FormatError
from formats.labels import has_controls

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors package."""

_BYTES_PER_TENSOR = 1024
"""A tensor, its filler and its packing in the metadata take a few hundred bytes."""

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
"""Element size of each dtype of safetensors, except those below one byte."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Offset in bytes from the start of the data section."""
    end: int
    """Offset in bytes of the first byte after the tensor."""

    @property
    def n_bytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """A parsed header."""

    entries: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_offset: int
    """Start of the data section, in bytes from the start of the file."""
    sha256: str
    """Hex digest of the file's bytes before the data section."""


def max_header_bytes(n_tensors: int, other_bytes: int = 64 << 10) -> int:
    """Return the upper bound of the header of a file with `n_tensors` tensors besides fillers.

    `other_bytes` is the allowance for metadata. The bound matters because parsing takes 20 times
    the header's size in memory.
    """
    return min(MAX_HEADER_BYTES, other_bytes + _BYTES_PER_TENSOR * n_tensors)


def build_header(entries: list[TensorEntry], metadata: dict[str, str]) -> bytes:
    """Write the bytes before the data section: length, JSON in the given order, padding.

    Spaces pad the header to a multiple of 4096 bytes.
    """
    body: dict[str, Any] = {"__metadata__": metadata}
    for entry in entries:
        body[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.begin, entry.end],
        }
    text = json.dumps(body, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT_BYTES)
    return struct.pack("<Q", len(text)) + text


def read_header(descriptor: int, where: str, max_bytes: int = MAX_HEADER_BYTES) -> Header:
    """Read the header of an open file; errors as in `header_from`."""
    size = os.fstat(descriptor).st_size
    return header_from(
        lambda offset, length: os.pread(descriptor, length, offset), size, where, max_bytes
    )


def header_from(
    read: Callable[[int, int], bytes], size: int, where: str, max_bytes: int = MAX_HEADER_BYTES
) -> Header:
    """Read the header of a file of `size` bytes through `read`.

    read(offset, length) returns bytes of the file, fewer at its end. A header over `max_bytes` is
    refused before it is read. Errors, with `where` in their messages:

    - FormatError for a violation of the safetensors specification, also where the safetensors
      package is lenient (duplicate keys, leading white space, holes, overlaps), and for dtypes
      below one byte.
    - DamageError if the file is shorter or longer than its tensors.
    """
    prefix = read(0, 8)
    if len(prefix) < 8:
        raise DamageError(f"{where}: {size} bytes, too short for a safetensors file")
    (length,) = struct.unpack("<Q", prefix)
    if length > max_bytes:
        raise FormatError(
            f"{where}: header of {length} bytes, the limit is {max_bytes}; not a safetensors file?"
        )
    text = read(8, min(length, size))
    if len(text) < length:
        raise DamageError(
            f"{where}: cut off inside its header: {size} bytes, the header ends at {8 + length}"
        )
    if not text.startswith(b"{"):
        raise FormatError(f"{where}: the header begins with {text[:1]!r}, not with '{{'")
    where_header = f"{where}: header"
    body = parse(text.rstrip(b" "), where_header, max_bytes=MAX_HEADER_BYTES, max_depth=4)
    if not isinstance(body, dict):
        raise FormatError(f"{where_header}: not an object")
    metadata = body.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{where_header}: __metadata__ is not an object of strings")
    entries = {name: _entry(name, value, where) for name, value in body.items()}
    _check_cover(entries, size - 8 - length, where)
    return Header(entries, metadata, 8 + length, hashlib.sha256(prefix + text).hexdigest())


def _entry(name: str, value: Any, where: str) -> TensorEntry:
    here = f"{where}: tensor {name[:200]!r}"
    if has_controls(name):
        raise FormatError(f"{here}: its name has control characters")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{here}: fields are not exactly dtype, shape, data_offsets")
    dtype = value["dtype"]
    shape = value["shape"]
    offsets = value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise FormatError(f"{here}: dtype {repr(dtype)[:100]} is unknown")
    if not _naturals(shape):
        raise FormatError(f"{here}: shape {repr(shape)[:100]} is not a list of integers >= 0")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(f"{here}: data_offsets {repr(offsets)[:100]} are not begin <= end")
    n_bytes = prod(shape) * DTYPE_BYTES[dtype]
    if n_bytes != offsets[1] - offsets[0]:
        raise FormatError(
            f"{here}: {offsets[1] - offsets[0]} bytes, {dtype} {shape} takes {n_bytes}"
        )
    return TensorEntry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _naturals(value: Any) -> bool:
    # The length is bounded because a shape's product is computed before any other check.
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(type(v) is int and 0 <= v < 2**53 for v in value)
    )


def _check_cover(entries: dict[str, TensorEntry], data_bytes: int, where: str) -> None:
    """Check that tensors cover the data section without hole or overlap."""
    position = 0
    for entry in sorted(entries.values(), key=lambda e: (e.begin, e.end)):
        if entry.begin != position:
            gap = "a hole" if entry.begin > position else "an overlap"
            raise FormatError(
                f"{where}: {gap} before tensor {entry.name!r}:"
                f" it begins at {entry.begin}, not {position}"
            )
        position = entry.end
    if position > data_bytes:
        raise DamageError(
            f"{where}: cut off: {data_bytes} bytes of data, the header says {position}",
            "get the file again",
        )
    if position < data_bytes:
        raise DamageError(
            f"{where}: {data_bytes - position} bytes after the last tensor", "get the file again"
        )
