"""A converted model on the Hub, opened by its index and headers: a few hundred kilobytes by ranges,
no weights.
"""

import struct
from pathlib import Path

from formats import INDEX_NAME
from formats.artifact import Artifact, read_head
from formats.errors import DamageError, FormatError
from formats.files.output_file import OutputFile, make_folders
from formats.hub.repo import HubRepo
from formats.hub.repo_files import read_small_file
from formats.hub.repo_listing import fetch_index
from formats.index_checks import layer_header_limit, trunk_header_limit
from formats.writer import write_file

_FIRST_BYTES = 4096


def open_remote(repo: HubRepo, folder: Path, index_name: str = INDEX_NAME) -> Artifact:
    """The artifact in `repo`, all of whose structure was checked as `Artifact.open` checks a
    folder's.

    `folder` gets index, config.json and quality.json, and the weight files with their headers: of
    the right size, but with holes where the weights would be. Raises what Artifact.open raises, and
    HubError; DamageError where the Hub's hash or size differs.
    """
    data, index = fetch_index(repo)
    make_folders(folder)
    for name in ("config.json", "quality.json"):
        if name in repo.files:
            write_file(folder / name, read_small_file(repo, name))
    write_file(folder / index_name, data)
    # Counts before headers: config.json bounds the numbers of layers and experts.
    read_head(folder, index_name)
    headers = [(index.trunk.file, index.trunk.size_bytes, trunk_header_limit(index.trunk))]
    headers += [(layer.file, layer.size_bytes, layer_header_limit(layer)) for layer in index.layers]
    for name, size, limit in headers:
        path = folder / name
        make_folders(path.parent)
        with OutputFile(path) as f:
            f.write_at(read_head_bytes(repo, name, limit), 0)
            f.truncate(size)
    return Artifact.open(folder, index_name)


def read_head_bytes(repo: HubRepo, name: str, max_bytes: int) -> bytes:
    """Everything before the data of a safetensors file, as it stands there.

    FormatError if that is no such file, or has a header over `max_bytes`.
    """
    file = repo.file(name)
    first = repo.read(name, 0, min(_FIRST_BYTES, file.size))
    if len(first) < 8:
        raise DamageError(f"{file}: {file.size} bytes, too short for a safetensors file")
    end = 8 + struct.unpack("<Q", first[:8])[0]
    if end > 8 + max_bytes:
        raise FormatError(f"{file}: header of {end - 8} bytes, allowed are {max_bytes}")
    if end > file.size:
        raise FormatError(f"{file}: its header would end at {end}, the file at {file.size}")
    return first[:end] + repo.read(name, len(first), end) if end > len(first) else first[:end]
