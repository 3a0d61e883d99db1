"""The files of a converted model's repository, as its index lists them.

The list is checked before any other file is fetched. Files that the index does not list, of any
number and size, are never fetched.
"""

import logging
from collections.abc import Callable, Collection
from pathlib import Path

from formats import INDEX_NAME
from formats.config.generation_config import GENERATION_NAME
from formats.config.side_files import MAX_BYTES
from formats.errors import DamageError, DoesNotFitError, NotConvertedError
from formats.files.disk_space import free_disk_bytes
from formats.hub.hub_settings import cache_root
from formats.hub.ranges import RemoteFile
from formats.hub.repo import HubRepo
from formats.hub.repo_files import MAX_SMALL_BYTES, read_small_file
from formats.index import Index, parse_index
from formats.index_checks import index_problems
from formats.sizes import format_size

_log = logging.getLogger(__name__)
_MAX_NAMED = 5
"""Number of unlisted files that a warning names."""


def fetch_index(repo: HubRepo) -> tuple[bytes, Index]:
    """Fetch the index of the converted model in `repo`: its bytes, and the parsed index.

    Raises NotConvertedError, HubError; FormatError if the index contradicts itself; DamageError if
    the Hub lists another size than the index for weights, or a size over the limit for other files.
    """
    _check_converted(repo)
    data = read_small_file(repo, INDEX_NAME)
    where = f"{repo.where}: {INDEX_NAME}"
    index = parse_index(data, where)
    for _, problem in index_problems(index, where):
        raise problem
    if not repo.offline:
        _check_sizes(repo, index)
    return data, index


def fetch_listed(
    repo: HubRepo,
    *,
    wanted: Callable[[str], bool] = lambda name: True,
    beside: Collection[str] = (),
    local_dir: Path | None = None,
    bars: bool = False,
) -> tuple[Path, list[RemoteFile]]:
    """Download the index and the files that it lists; return the folder and the files.

    wanted: selects names among the listed files. beside: names of further files, if the repository
    has them. local_dir: the folder, None for the cache's. bars: let huggingface_hub draw progress
    bars. Raises the errors of `fetch_index`, `check_space` and `HubRepo.snapshot`.
    """
    names = {INDEX_NAME, *filter(wanted, _listed(fetch_index(repo)[1])), *beside}
    files = [file for name, file in repo.files.items() if name in names]
    if not repo.offline:
        for file in files:
            if file.name in beside and file.size > MAX_SMALL_BYTES:
                raise DamageError(f"{file} has {file.size} bytes, the limit is {MAX_SMALL_BYTES}")
        check_space(repo, files, local_dir)
    # Checked names contain no special characters of patterns.
    return repo.snapshot(sorted(names), local_dir=local_dir, bars=bars), files


def cached_folder(repo: HubRepo) -> Path | None:
    """Return the folder in the Hub's cache if all files that the index lists are there, else None.

    Raises the errors of `fetch_index`.
    """
    if INDEX_NAME not in repo.files or repo.cached(INDEX_NAME) is None:
        return None
    index = fetch_index(repo)[1]
    weights = {index.trunk.file, *(layer.file for layer in index.layers)}
    names = [name for name in _listed(index) if name in weights or name in repo.files]
    if not all(name in repo.files and repo.cached(name) for name in names):
        return None
    return fetch_listed(repo)[0]


def check_space(repo: HubRepo, files: list[RemoteFile], local_dir: Path | None) -> None:
    """Raise DoesNotFitError if the missing files of `files` exceed the free disk space.

    Logs their number and size. local_dir: as in `fetch_listed`.
    """
    target = local_dir or cache_root()
    missing = [
        file
        for file in files
        if not (_has(local_dir, file) if local_dir else repo.cached(file.name))
    ]
    needed = sum(file.size for file in missing)
    free = free_disk_bytes(target)
    if needed > free:
        raise DoesNotFitError(
            f"{target}: the download needs {needed} bytes, only {free} are free", "free some space"
        )
    if missing:
        _log.info("%s: fetching %d files, %s", repo.repo, len(missing), format_size(needed))


def note_unlisted(repo: HubRepo, fetched: Collection[str]) -> None:
    """Log a warning that names the repository's files which are not in `fetched`."""
    left = sorted(repo.files.keys() - set(fetched) - {".gitattributes"})
    if left:
        more = f" and {len(left) - _MAX_NAMED} more" if len(left) > _MAX_NAMED else ""
        _log.warning(
            "%s: not fetched: %s%s: %s does not list them",
            repo.repo,
            ", ".join(left[:_MAX_NAMED]),
            more,
            INDEX_NAME,
        )


def _listed(index: Index) -> list[str]:
    return [
        "config.json",
        index.trunk.file,
        *(f.file for f in index.layers),
        *(f.file for f in index.files),
    ]


def _check_sizes(repo: HubRepo, index: Index) -> None:
    for name, size in (
        (index.trunk.file, index.trunk.size_bytes),
        *((f.file, f.size_bytes) for f in index.layers),
    ):
        if (listed := repo.file(name).size) != size:
            raise DamageError(f"{repo.where}: {name} has {listed} bytes, the index says {size}")
    limits = {file.file: MAX_BYTES for file in index.files}
    limits |= dict.fromkeys(("config.json", GENERATION_NAME), MAX_SMALL_BYTES)
    for name, limit in limits.items():
        # A missing or edited file is an error only for its users.
        if name in repo.files and (listed := repo.files[name].size) > limit:
            raise DamageError(f"{repo.where}: {name} has {listed} bytes, the limit is {limit}")


def _has(folder: Path, file: RemoteFile) -> bool:
    path = folder / file.name
    return path.is_file() and path.stat().st_size == file.size


def _check_converted(repo: HubRepo) -> None:
    """Raise NotConvertedError if the repository holds no converted model.

    Offline it passes, because not all files are known.
    """
    if INDEX_NAME not in repo.files and not repo.offline:
        raise NotConvertedError(
            f"{repo.where} on the Hub is not converted: it has no {INDEX_NAME}",
            f"moe-convert convert {repo.repo}",
        )
