"""The expert-addressable format of moe-convert: packings, files, index, checks (docs/format.md)."""

OLDEST_READABLE_VERSION = 1
NEWEST_READABLE_VERSION = 1
WRITTEN_VERSION = 1
"""Format versions: what this release reads (oldest to newest, inclusive) and what it writes."""

INDEX_NAME = "moe_index.json"
TRUNK_NAME = "trunk.safetensors"
EXPERTS_FOLDER = "experts"
ALIGNMENT_BYTES = 4096
"""Experts and data sections begin at multiples of this: one page, and what O_DIRECT asks for."""
