"""Opening of a converted model on the Hub by its index and headers: some 100 kB, no weights."""

from pathlib import Path

from formats import ALIGNMENT_BYTES, INDEX_NAME
from formats.artifact import Artifact, read_head
from formats.files.output_file import OutputFile, make_folders
from formats.files.partial_file import write_file
from formats.hub.remote_header import fetch_header
from formats.hub.repo import HubRepo
from formats.hub.repo_files import read_small_file
from formats.hub.repo_listing import fetch_index
from formats.index_checks import layer_header_limit, trunk_header_limit


def open_remote(repo: HubRepo, folder: Path, index_name: str = INDEX_NAME) -> Artifact:
    """Open the artifact in `repo`, with the checks of `Artifact.open`.

    Writes index, config.json and quality.json to `folder`, and weight files of the right size with
    their headers, but holes instead of weights. Raises the errors of Artifact.open, HubError, and
    DamageError if the Hub's hash or size differs.
    """
    data, index = fetch_index(repo)
    make_folders(folder)
    for name in ("config.json", "quality.json"):
        if name in repo.files:
            write_file(folder / name, read_small_file(repo, name))
    write_file(folder / index_name, data)
    # Before the headers: config.json limits the numbers of layers and experts.
    read_head(folder, index_name)
    headers = [(index.trunk.file, index.trunk.size_bytes, trunk_header_limit(index.trunk))]
    headers += [(layer.file, layer.size_bytes, layer_header_limit(layer)) for layer in index.layers]
    for name, size, limit in headers:
        path = folder / name
        make_folders(path.parent)
        with OutputFile(path) as f:
            # Our headers are padded to multiples of ALIGNMENT_BYTES.
            _, start = fetch_header(repo, name, limit, first_bytes=ALIGNMENT_BYTES)
            f.write_at(start, 0)
            f.truncate(size)
    return Artifact.open(folder, index_name)
