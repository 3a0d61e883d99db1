"""The state of a pass over layers that can be interrupted: numbers and the activations, kept with
their checksum.
"""

import logging
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from formats.checksums import sha256_of
from formats.files.output_file import make_folder
from formats.writer import write_file

_log = logging.getLogger(__name__)


def write_state(path: Path, identity: str, progress: Any, activations: Tensor) -> None:
    """Keeps `progress` (JSON) and `activations` (float32), which were computed from what `identity`
    says.

    The file is the sha256 of the rest in hex, a line feed, a line of JSON, and the activations'
    bytes.
    """
    make_folder(path.parent)
    head = msgspec.json.encode([identity, progress, list(activations.shape)])
    rest = head + b"\n" + activations.contiguous().numpy().tobytes()
    write_file(path, sha256_of(rest).encode() + b"\n" + rest)


def read_state(path: Path, identity: str, shape: tuple[int, ...]) -> tuple[Any, Tensor] | None:
    """(progress, activations float32 [*shape]) as they were kept.

    None where there are none of this identity and shape, or where they are damaged: a warning then
    says so.
    """
    try:
        data = path.read_bytes()
    except OSError:
        return None
    checksum, _, rest = data.partition(b"\n")
    if sha256_of(rest).encode() != checksum:
        _log.warning("%s is damaged: the layers are passed through again", path)
        return None
    head, _, values = rest.partition(b"\n")
    found, progress, sizes = msgspec.json.decode(head)
    if (found, sizes) != (identity, list(shape)):
        return None
    return progress, torch.frombuffer(bytearray(values), dtype=torch.float32).view(shape)
