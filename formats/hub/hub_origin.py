"""A published converted model as the origin of a repair, which fetches single experts by ranges."""

from pathlib import Path

from formats import INDEX_NAME
from formats.errors import DamageError
from formats.hub.repo import HubRepo
from formats.hub.repo_files import fetch_file, read_small_file
from formats.index import ExpertEntry, Index, parse_index
from formats.repair.repairs import Origin


class HubOrigin(Origin):
    """The converted model in `repo`. Raises HubError, FormatError."""

    def __init__(self, repo: HubRepo) -> None:
        self._repo = repo
        self.index_bytes = read_small_file(repo, INDEX_NAME)
        self.index: Index = parse_index(self.index_bytes, f"{repo.where}: {INDEX_NAME}")

    def expert(self, entry: ExpertEntry) -> bytes:
        layers = self.index.layers
        experts = layers[entry.layer].experts if entry.layer < len(layers) else []
        published = experts[entry.expert] if entry.expert < len(experts) else None
        if published is None or (published.sha256, published.length) != (
            entry.sha256,
            entry.length,
        ):
            raise DamageError(
                f"{self._repo.where}: layer {entry.layer} expert {entry.expert} differs from the"
                f" folder's, whose sha256 is {entry.sha256}",
                "give the repository and --revision that the folder came from, or the checkpoint",
            )
        begin = published.offset
        return self._repo.read(layers[entry.layer].file, begin, begin + published.length)

    def file(self, name: str, sha256: str, path: Path) -> None:
        fetch_file(self._repo, name, sha256, path)
