"""The expert-addressable format of moe-convert: packings, files, index, checks (docs/format.md)."""

FORMAT_VERSION = 3
"""The one format version that this release reads and writes."""

INDEX_NAME = "moe_index.json"
TRUNK_NAME = "trunk.safetensors"
EXPERTS_FOLDER = "experts"
JOURNAL_NAME = ".moe-convert.journal"
LOCK_NAME = ".moe-convert.lock"
"""The last two are there while a folder is being converted, and stay where that was interrupted."""
PENDING_NAME = "moe_index.json.partial"
"""The index of a model that is being fetched, while experts are missing."""
ALIGNMENT_BYTES = 4096
"""Experts and data sections begin at multiples of this: one page, and what O_DIRECT asks for."""
