"""The converted folder: the contract between converter and loader (docs/format.md is normative).

Vocabulary, from small to large:

- *Code*: a weight as an unsigned integer of 2, 3 or 4 bits.
- *Group*: consecutive columns of one row that share a scale S and a minimum M.
- *Tile*: 32 packed rows of a matrix. *Superblock*: 256 columns of a tile.
- *Packing*: a named byte layout of one matrix: tiles, or plain rows of 16-bit floats.
- *Expert*: the matrices gate and up (packing `gate_up`) and down (packing `down`). Its bytes are
  contiguous in the file and begin at a multiple of 4096.
- *Filler*: the zero bytes after an expert, up to the next multiple of 4096.
- *Layer*: a decoder layer with experts, counted from 0 among these. Decoder layer 3 is layer 2 if
  decoder layer 0 has no experts.
- *Layer file*: a safetensors file with all experts of one layer. *Trunk*: all other tensors.
- *Codec*: an expert's bytes in the file are stored as packed (`none`) or compressed (`zstd`).
- *Index*: moe_index.json: offset, length, checksums, packings and codec of each expert.
- *Artifact*: a converted folder whose index, headers and file sizes were compared.

Reading order:

1. `packing.py`: sizes of a matrix. `tiles.py`, `tile_bits.py`: its bytes, packed and unpacked.
2. `expert.py`: the bytes of one expert.
3. `safetensors_header.py`, `layer_file.py`, `trunk.py`: the files.
4. `index.py`, `index_checks.py`: the index. `checksums.py`, `labels.py`: types of its fields.
5. `artifact.py` opens a folder; `writer.py` writes one.
6. `errors.py`: all error classes. `quality.py`, `prediction.py`, `progress.py`, `sizes.py`,
   `repo_names.py`, `model_memory.py`: small shared types. `unconverted.py`, `repair_hints.py`,
   `install.py`: what an error advises.

Rooms: `config` (JSON from strangers), `reading` (readers of experts), `files` (paths, locks,
durable writes), `hub` (repositories), `repair`, `native` (C++ headers).

Invariants: a folder is used only after every number of its index was compared with the files. No
module here imports transformers, `converter` or `loader`.
"""

FORMAT_VERSION = 3
"""The only format version that this release reads and writes."""

INDEX_NAME = "moe_index.json"
TRUNK_NAME = "trunk.safetensors"
EXPERTS_FOLDER = "experts"

JOURNAL_NAME = ".moe-convert.journal"
LOCK_NAME = ".moe-convert.lock"
"""Journal and lock exist during a conversion, and remain after an interrupted one."""

PENDING_NAME = "moe_index.json.partial"
"""The index of a lazy folder while experts are still on the Hub."""

ALIGNMENT_BYTES = 4096
"""Experts and data sections begin at multiples of this: the page size, required by O_DIRECT."""
