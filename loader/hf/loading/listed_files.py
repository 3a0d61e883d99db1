"""What transformers sees of a converted folder: files that the index lists, and of those only names
that it may read.

An adapter, a chat template or other weights that somebody put beside them are neither listed nor
verified.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from formats import INDEX_NAME
from formats.config.side_files import is_read_by_transformers, names_beside_weights
from formats.files.paths import locate
from formats.index import Index

_log = logging.getLogger(__name__)
_ADAPTERS = {"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"}
_warned: set[tuple[str, str]] = set()


@contextmanager
def link_listed_files(folder: Path, index: Index, wanted: Callable[[str], bool]) -> Iterator[Path]:
    """A temporary folder of links to the files of `index` for whose names `wanted` is true.

    Warns, once, of files in `folder` that transformers would have read and the index does not list.
    Raises what `locate` raises.
    """
    listed = {file.file for file in index.files} | {index.trunk.file}
    for name in names_beside_weights(folder):
        if name not in listed and (name in _ADAPTERS or is_read_by_transformers(name)):
            if (str(folder), name) not in _warned:
                _log.warning("%s is not used: %s does not list it", folder / name, INDEX_NAME)
            _warned.add((str(folder), name))
    with tempfile.TemporaryDirectory(prefix="moe-convert-") as temporary:
        view = Path(temporary)
        for name in sorted(filter(wanted, listed)):
            (view / name).parent.mkdir(parents=True, exist_ok=True)
            os.symlink(locate(folder, name, str(folder)), view / name)
        yield view
