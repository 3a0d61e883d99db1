"""A converted model on the Hub, opened by its index and headers: a few hundred kilobytes by ranges, no weights."""

import struct
from pathlib import Path

from formats import INDEX_NAME
from formats.artifact import Artifact
from formats.errors import DamageError, FormatError
from formats.hub import HubRepo
from formats.index import parse_index
from formats.output_file import OutputFile, make_folders
from formats.paths import check_name
from formats.safetensors_header import MAX_HEADER_BYTES
from formats.unconverted import check_converted_repo
from formats.writer import write_file

_MAX_SMALL_BYTES = 16 << 20
_FIRST_BYTES = 4096


def open_remote(repo: HubRepo, folder: Path, index_name: str = INDEX_NAME) -> Artifact:
    """The artifact in `repo`, all of whose structure was checked as `Artifact.open` checks a folder's.

    `folder` gets index, config.json and quality.json, and the weight files with their headers: of the right size, but
    with holes where the weights would be. Raises what Artifact.open raises, and HubError; DamageError where the Hub's
    hash or size differs.
    """
    check_converted_repo(repo)
    data = read_small_file(repo, INDEX_NAME)
    make_folders(folder)
    for name in ("config.json", "quality.json"):
        if name in repo.files:
            write_file(folder / name, read_small_file(repo, name))
    where = f"{repo.repo}@{repo.commit[:12]}"
    index = parse_index(data, f"{where}: {INDEX_NAME}")
    for file, size in ((index.trunk.file, index.trunk.size_bytes), *((f.file, f.size_bytes) for f in index.layers)):
        name = check_name(file, f"{where}: {INDEX_NAME}")
        if (found := repo.file(name).size) != size:
            raise DamageError(f"{where}: {name} has {found} bytes, the index says {size}")
        path = folder / name
        make_folders(path.parent)
        with OutputFile(path) as f:
            f.write_at(read_head_bytes(repo, name), 0)
            f.truncate(size)
    write_file(folder / index_name, data)
    return Artifact.open(folder, index_name)


def read_head_bytes(repo: HubRepo, name: str) -> bytes:
    """Everything before the data of a safetensors file, as it stands there; FormatError if that is no such file."""
    file = repo.file(name)
    first = repo.read(name, 0, min(_FIRST_BYTES, file.size))
    if len(first) < 8:
        raise DamageError(f"{file}: {file.size} bytes, too short for a safetensors file")
    end = 8 + struct.unpack("<Q", first[:8])[0]
    if end > min(8 + MAX_HEADER_BYTES, file.size):
        raise FormatError(f"{file}: its header would end at {end}, the file at {file.size}")
    return first[:end] + repo.read(name, len(first), end) if end > len(first) else first[:end]


def read_small_file(repo: HubRepo, name: str) -> bytes:
    """A whole small file, compared with the Hub's hash."""
    file = repo.file(name)
    if file.size > _MAX_SMALL_BYTES:
        raise DamageError(f"{file} has {file.size} bytes, allowed are {_MAX_SMALL_BYTES}")
    data = repo.read(name, 0, file.size)
    hasher = file.hasher()
    hasher.update(data)
    if hasher.hexdigest() != file.etag:
        raise DamageError(f"{file}: its hash is {hasher.hexdigest()}, the Hub says {file.etag}")
    return data
