"""Headers of safetensors files: read strictly, written so that data begins at a multiple of 4096."""

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

_BYTES_A_TENSOR = 1024
"""More than a tensor, its filler and its packing in the metadata take: a few hundred."""

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a header: `begin` and `end` (exclusive) are bytes from the start of the file's
    data section.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def n_bytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """A parsed header. `data_offset` is where the data section begins in the file, in bytes;
    `sha256` is the hex digest of the file's bytes before it.
    """

    entries: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_offset: int
    sha256: str


def max_header_bytes(n_tensors: int, other_bytes: int = 64 << 10) -> int:
    """The most bytes that the header of a file may have that must hold `n_tensors`, fillers not
    counted, with `other_bytes` for everything else.

    Parsing takes 20 times the memory: a stranger's file of ten tensors must not have a header of
    100 MB.
    """
    return min(MAX_HEADER_BYTES, other_bytes + _BYTES_A_TENSOR * n_tensors)


def build_header(entries: list[TensorEntry], metadata: dict[str, str]) -> bytes:
    """The bytes before the data section: length, JSON in the order given, spaces up to a multiple
    of 4096.
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
    """The header of the open file `descriptor`; raises what `header_from` raises."""
    size = os.fstat(descriptor).st_size
    return header_from(
        lambda offset, length: os.pread(descriptor, length, offset), size, where, max_bytes
    )


def header_from(
    read: Callable[[int, int], bytes], size: int, where: str, max_bytes: int = MAX_HEADER_BYTES
) -> Header:
    """The header of a file of `size` bytes, of which read(offset, length) gives parts (fewer bytes
    past its end).

    FormatError naming `where` for a header over `max_bytes`, of which nothing is read, and for what
    the safetensors specification forbids, including what its package lets pass (duplicate keys,
    leading white space), for holes and overlaps, and for dtypes that are not whole bytes;
    DamageError if the file is shorter or longer than it says.
    """
    prefix = read(0, 8)
    if len(prefix) < 8:
        raise DamageError(f"{where}: {size} bytes, too short for a safetensors file")
    (length,) = struct.unpack("<Q", prefix)
    if length > max_bytes:
        raise FormatError(
            f"{where}: header of {length} bytes, allowed are {max_bytes}; not a safetensors file?"
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
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
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
    # The length is bounded because the product of a shape is computed before anything is compared
    # with it.
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(type(v) is int and 0 <= v < 2**53 for v in value)
    )


def _check_cover(entries: dict[str, TensorEntry], data_bytes: int, where: str) -> None:
    """Tensors must follow each other without hole or overlap and end where the file ends."""
    position = 0
    for entry in sorted(entries.values(), key=lambda e: (e.begin, e.end)):
        if entry.begin != position:
            what = "a hole" if entry.begin > position else "an overlap"
            raise FormatError(
                f"{where}: {what} before tensor {entry.name!r}: it begins at {entry.begin}, not {position}"
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
