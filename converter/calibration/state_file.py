"""State file of an interruptible pass over layers: progress, activations and a checksum."""

import logging
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from formats.checksums import sha256_of
from formats.files.output_file import make_folder
from formats.files.partial_file import write_file

_log = logging.getLogger(__name__)


def write_state(path: Path, identity: str, progress: Any, activations: Tensor) -> None:
    """Store `progress` (JSON) and `activations` (float32), computed from `identity`.

    The file is the sha256 of all that follows it in hex, a line feed, a line of JSON, and the bytes
    of the activations.
    """
    make_folder(path.parent)
    head = msgspec.json.encode([identity, progress, list(activations.shape)])
    content = head + b"\n" + activations.contiguous().numpy().tobytes()
    write_file(path, sha256_of(content).encode() + b"\n" + content)


def read_state(path: Path, identity: str, shape: tuple[int, ...]) -> tuple[Any, Tensor] | None:
    """Return the stored progress and activations, float32 of `shape`.

    Return None if the file is missing, has another identity or shape, or is damaged. Damage is
    logged as a warning.
    """
    try:
        data = path.read_bytes()
    except OSError:
        return None
    checksum, _, content = data.partition(b"\n")
    if sha256_of(content).encode() != checksum:
        _log.warning("%s is damaged: the pass starts again from the first layer", path)
        return None
    head, _, values = content.partition(b"\n")
    stored_identity, progress, stored_shape = msgspec.json.decode(head)
    if (stored_identity, stored_shape) != (identity, list(shape)):
        return None
    return progress, torch.frombuffer(bytearray(values), dtype=torch.float32).view(shape)
