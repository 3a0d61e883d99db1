"""The expert-addressable format of moe-convert: packings, files, index, checks (docs/format.md)."""

OLDEST_READABLE_VERSION = 1
NEWEST_READABLE_VERSION = 2
"""Format versions that this release reads. It writes the lowest that has all that a folder uses
(`formats.packing.version_of`)."""

INDEX_NAME = "moe_index.json"
TRUNK_NAME = "trunk.safetensors"
EXPERTS_FOLDER = "experts"
ALIGNMENT_BYTES = 4096
"""Experts and data sections begin at multiples of this: one page, and what O_DIRECT asks for."""
