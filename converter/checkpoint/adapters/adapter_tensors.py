"""adapter_model.safetensors: its header, and its tensors in memory."""

import os
from pathlib import Path

import torch
from torch import Tensor

from converter.checkpoint.adapters.adapter_config import GET_AGAIN_HINT
from converter.checkpoint.shards.shard_source import cut_off, pread_into
from formats.errors import FormatError, SourceError
from formats.files.io_errors import translated
from formats.files.paths import check_no_pointer, locate_source, open_regular
from formats.safetensors_header import Header, read_header

WEIGHTS_NAME = "adapter_model.safetensors"


class AdapterTensors:
    """The tensors of an adapter's file. Use it as a context, which closes the file.

    dtypes: those that are read, by safetensors' names. max_header_bytes: limit of the header.
    Raises SourceError for a damaged file and for another dtype.
    """

    def __init__(self, folder: Path, dtypes: dict[str, torch.dtype], max_header_bytes: int) -> None:
        self._folder = folder
        self._dtypes = dtypes
        self._path = folder / WEIGHTS_NAME
        self._descriptor = open_regular(locate_source(folder, WEIGHTS_NAME, str(folder)))
        try:
            self.header = self._read_header(max_header_bytes)
            for name, entry in self.header.entries.items():
                if entry.dtype not in dtypes:
                    raise SourceError(
                        f"{self._path}: tensor {name} is {entry.dtype}, expected is one of"
                        f" {', '.join(dtypes)}",
                        "save the adapter in one of these",
                    )
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> "AdapterTensors":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def shapes(self) -> dict[str, Tensor]:
        """Return each tensor on the meta device: shape and dtype without values."""
        return {
            name: torch.empty(entry.shape, dtype=self._dtypes[entry.dtype], device="meta")
            for name, entry in self.header.entries.items()
        }

    def values(self) -> dict[str, Tensor]:
        """Read and return all tensors. SourceError for infinite or NaN values."""
        return {name: self._read(name) for name in self.header.entries}

    def _read(self, name: str) -> Tensor:
        entry = self.header.entries[name]
        data = torch.empty(entry.n_bytes, dtype=torch.uint8)
        view = memoryview(data.numpy())  # type: ignore[arg-type]
        with translated(self._path, "read", SourceError):
            count = pread_into(self._descriptor, self.header.data_offset + entry.begin, view)
        if count < len(view):
            raise cut_off(str(self._folder), WEIGHTS_NAME, name)
        values = data.view(self._dtypes[entry.dtype]).view(entry.shape)
        if not bool(torch.isfinite(values).all()):
            raise SourceError(
                f"{self._path}: tensor {name} has NaN or infinite values",
                "train the adapter again, or get its file again",
            )
        return values

    def _read_header(self, max_bytes: int) -> Header:
        with translated(self._path, "read", SourceError):
            check_no_pointer(os.pread(self._descriptor, 64, 0), self._path)
            try:
                return read_header(self._descriptor, str(self._path), max_bytes)
            except FormatError as e:
                raise SourceError(e.message, GET_AGAIN_HINT) from None
