"""Compares a complete layer file with its record in the journal, before a resume keeps it."""

import os
from pathlib import Path

import xxhash

from converter.journal.records import LayerRecord
from formats.checksums import sha256_of
from formats.files.io_errors import translated
from formats.files.paths import open_regular

_READ_BYTES = 16 << 20


def difference(path: Path, record: LayerRecord) -> str | None:
    """Return the first difference between a file and its record, in words; None if there is none.

    Compares the size, the header's sha256, the xxh3 of every expert's stored bytes, and the zero
    bytes between experts. OutputError if the file cannot be read.
    """
    with translated(path, "read"), os.fdopen(open_regular(path), "rb", buffering=0) as file:
        descriptor = file.fileno()
        size_bytes = os.fstat(descriptor).st_size
        if size_bytes != record.size_bytes:
            return f"it has {size_bytes} bytes instead of {record.size_bytes}"
        # The header is padded up to the first expert.
        if sha256_of(os.pread(descriptor, record.places[0].offset, 0)) != record.header_sha256:
            return "the bytes of its header changed"
        begins = [*(place.offset for place in record.places), size_bytes]
        for expert, place in enumerate(record.places):
            if _xxh3(descriptor, place.offset, place.length) != place.xxh3:
                return f"the bytes of expert {expert} changed"
            end = place.offset + place.length
            if any(os.pread(descriptor, begins[expert + 1] - end, end)):
                return f"the zero bytes behind expert {expert} changed"
    return None


def _xxh3(descriptor: int, offset: int, length: int) -> str:
    checksum = xxhash.xxh3_128()
    for begin in range(offset, offset + length, _READ_BYTES):
        checksum.update(os.pread(descriptor, min(_READ_BYTES, offset + length - begin), begin))
    return checksum.hexdigest()
