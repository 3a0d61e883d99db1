"""What a converted model's repository must have by its index: compared before anything else of it
is fetched.

A repository may hold other files, of any number and size: they are never fetched.
"""

import logging
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from formats import INDEX_NAME
from formats.config.generation_config import GENERATION_NAME
from formats.config.side_files import MAX_BYTES
from formats.errors import DamageError, DoesNotFitError
from formats.files.io_errors import translated
from formats.hub.ranges import RemoteFile
from formats.hub.repo import HubRepo, cache_root
from formats.hub.repo_files import MAX_SMALL_BYTES, read_small_file
from formats.index import Index, parse_index
from formats.index_checks import index_problems
from formats.repair.unconverted import check_converted_repo

_log = logging.getLogger(__name__)
_NAMED = 5


def fetch_index(repo: HubRepo) -> tuple[bytes, Index]:
    """The index of the converted model in `repo`: its bytes, and what they say. Nothing else is
    fetched.

    Raises NotConvertedError, HubError; FormatError where the index disagrees with itself;
    DamageError where the Hub lists another size than the index for weights, or more for a small
    file than one may have.
    """
    check_converted_repo(repo)
    where = f"{repo.repo}@{repo.commit[:12]}"
    data = read_small_file(repo, INDEX_NAME)
    index = parse_index(data, f"{where}: {INDEX_NAME}")
    for _, problem in index_problems(index, f"{where}: {INDEX_NAME}"):
        raise problem
    if not repo.offline:
        _check_sizes(repo, index, where)
    return data, index


def fetch_listed(
    repo: HubRepo,
    *,
    wanted: Callable[[str], bool] = lambda name: True,
    beside: Collection[str] = (),
    local_dir: Path | None = None,
    bars: bool = False,
) -> tuple[Path, list[RemoteFile]]:
    """The folder (`local_dir`, or the cache's) with these files: the index, what it lists and
    `wanted` takes, and those of the names `beside` that are there.

    bars: whether huggingface_hub draws its progress. Raises what `fetch_index` and `check_room`
    raise.
    """
    names = {INDEX_NAME, *filter(wanted, _listed(fetch_index(repo)[1])), *beside}
    files = [file for name, file in repo.files.items() if name in names]
    if not repo.offline:
        for file in files:
            if file.name in beside and file.size > MAX_SMALL_BYTES:
                raise DamageError(f"{file} has {file.size} bytes, allowed are {MAX_SMALL_BYTES}")
        check_room(repo, files, local_dir)
    # Checked names have no character that means something in a pattern.
    return repo.snapshot(sorted(names), local_dir=local_dir, bars=bars), files


def check_room(repo: HubRepo, files: list[RemoteFile], local_dir: Path | None) -> None:
    """DoesNotFitError if those of `files` that are not there yet need more disk than there is; logs
    what they need.
    """
    place = local_dir or cache_root()
    folder = next(p for p in (place, *place.absolute().parents) if p.exists())
    missing = [
        file
        for file in files
        if not (_has(local_dir, file) if local_dir else repo.cached(file.name))
    ]
    needed = sum(file.size for file in missing)
    with translated(folder, "used"):
        free = shutil.disk_usage(folder).free
    if needed > free:
        raise DoesNotFitError(
            f"{place}: the download needs {needed} bytes, free are {free}", "free some space"
        )
    if missing:
        _log.info("%s: fetching %d files, %d MB", repo.repo, len(missing), needed // 10**6)


def note_unlisted(repo: HubRepo, fetched: Collection[str]) -> None:
    """Logs, once, the repository's files that are none of `fetched`."""
    left = sorted(repo.files.keys() - set(fetched) - {".gitattributes"})
    if left:
        more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
        _log.warning(
            "%s: not fetched: %s%s: %s does not list them",
            repo.repo,
            ", ".join(left[:_NAMED]),
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


def _check_sizes(repo: HubRepo, index: Index, where: str) -> None:
    for name, size in (
        (index.trunk.file, index.trunk.size_bytes),
        *((f.file, f.size_bytes) for f in index.layers),
    ):
        if (found := repo.file(name).size) != size:
            raise DamageError(f"{where}: {name} has {found} bytes, the index says {size}")
    limits = {file.file: MAX_BYTES for file in index.files}
    limits |= dict.fromkeys(("config.json", GENERATION_NAME), MAX_SMALL_BYTES)
    for name, limit in limits.items():
        # That one is missing, or was edited, is for those to say who use it.
        if name in repo.files and (found := repo.files[name].size) > limit:
            raise DamageError(f"{where}: {name} has {found} bytes, allowed are {limit}")


def _has(folder: Path, file: RemoteFile) -> bool:
    path = folder / file.name
    return path.is_file() and path.stat().st_size == file.size
