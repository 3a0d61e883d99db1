"""The expert-addressable format of moe-convert: packings, files, index, checks (docs/format.md)."""

FORMAT_VERSION = 3
"""The one format version that this release reads and writes."""

INDEX_NAME = "moe_index.json"
TRUNK_NAME = "trunk.safetensors"
EXPERTS_FOLDER = "experts"
ALIGNMENT_BYTES = 4096
"""Experts and data sections begin at multiples of this: one page, and what O_DIRECT asks for."""
