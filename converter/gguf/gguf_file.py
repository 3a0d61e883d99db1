"""Writes the GGUF file of a converted folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from converter.gguf.encode import encoded_chunks, encoded_floats
from converter.gguf.header import build_header, padded
from converter.gguf.hyperparameters import check_model
from converter.gguf.options import ExportOptions
from converter.gguf.tensor_plan import MATRICES, StackedTensor, Tensor, TrunkTensor, plan_tensors
from converter.gguf.vocabulary import read_vocabulary
from converter.torch_threads import one_torch_thread
from formats.artifact import Artifact
from formats.errors import DoesNotFitError
from formats.expert import split
from formats.files.disk_space import free_disk_bytes
from formats.files.io_errors import translated
from formats.files.output_file import OutputFile
from formats.files.partial_file import new_file
from formats.progress import Progress, no_progress
from formats.reading.reader import ExpertReader
from formats.reading.whole_files import check_files


@dataclass(frozen=True)
class Plan:
    """An export whose sizes and header are known. offsets: of each tensor in the file, in bytes."""

    artifact: Artifact
    options: ExportOptions
    tensors: list[Tensor]
    header: bytes
    offsets: list[int]
    total_bytes: int


def plan_export(artifact: Artifact, tokenizer: Any, options: ExportOptions) -> Plan:
    """Check that the model can be exported, and fix every byte's place. Reads no weights.

    tokenizer: the model's, from transformers. Raises MoeConvertError, RecipeError, TokenizerError.
    """
    check_model(artifact)
    tensors = plan_tensors(artifact, options)
    where = str(artifact.folder)
    vocabulary = read_vocabulary(tokenizer, artifact.config, where)
    header = build_header(artifact, tensors, vocabulary, options.license)
    offsets = []
    end = len(header)
    for tensor in tensors:
        offsets.append(end)
        end += padded(tensor.n_bytes)
    return Plan(artifact, options, tensors, header, offsets, end)


def write_gguf(
    plan: Plan, reader: ExpertReader, out: Path, progress: Progress = no_progress
) -> None:
    """Write the file `out`, which appears when it is complete. One expert is in memory at a time.

    reader: of the artifact's experts; it checks each one. An interrupted export leaves nothing, and
    the next one starts anew. Raises DoesNotFitError before writing if the disk has too little
    space, DamageError for wrong bytes of the folder, and the errors of OutputFile.
    """
    artifact = plan.artifact
    _check_disk(out, plan.total_bytes)
    if plan.options.check != "none":
        check_files(artifact.folder, artifact.index, [artifact.index.trunk.file])
    # A chunk takes milliseconds. On a busy machine torch's threads wait for each other: an export
    # of 2.8 billion weights took 212 s with two threads, 32 s with one.
    with one_torch_thread(), new_file(out) as file:
        file.allocate(plan.total_bytes)
        file.write_at(plan.header, 0)
        writing = _Writing(plan, file, progress)
        writing.write_trunk()
        writing.write_experts(reader)


class _Writing:
    """The data of one export, written tensor by tensor and expert by expert."""

    def __init__(self, plan: Plan, file: OutputFile, progress: Progress) -> None:
        self._plan = plan
        self._file = file
        self._progress = progress
        self._done = len(plan.header)

    def write_trunk(self) -> None:
        """Write attention, router, norms, embeddings and head."""
        artifact = self._plan.artifact
        path = artifact.folder / artifact.index.trunk.file
        with translated(path, "read"), safe_open(path, framework="pt") as trunk:
            for tensor, offset in zip(self._plan.tensors, self._plan.offsets, strict=True):
                if isinstance(tensor, TrunkTensor):
                    self._write_trunk_tensor(tensor, trunk.get_tensor(tensor.entry.name), offset)

    def write_experts(self, reader: ExpertReader) -> None:
        """Write the experts of all layers."""
        by_layer: dict[int, list[tuple[StackedTensor, int]]] = {}
        for tensor, offset in zip(self._plan.tensors, self._plan.offsets, strict=True):
            if isinstance(tensor, StackedTensor):
                by_layer.setdefault(tensor.layer, []).append((tensor, offset))
        for layer, stacked in by_layer.items():
            for expert in range(self._plan.artifact.architecture.num_local_experts):
                self._write_expert(reader, layer, expert, stacked)

    def _write_trunk_tensor(self, tensor: TrunkTensor, stored: torch.Tensor, offset: int) -> None:
        if tensor.packing is None:
            rows = encoded_floats(stored.reshape(-1, tensor.shape[-1]), tensor.kind, tensor.name)
        else:
            n_rows, columns = tensor.shape
            chunks = encoded_chunks(
                tensor.packing, stored, n_rows, columns, tensor.kind, tensor.name
            )
            rows = torch.cat(list(chunks))
        if tensor.heads:
            rows = rows[rotary_order(len(rows), tensor.heads)]
        self._write(rows, offset)

    def _write_expert(
        self,
        reader: ExpertReader,
        layer: int,
        expert: int,
        stacked: list[tuple[StackedTensor, int]],
    ) -> None:
        layout = self._plan.artifact.layout(layer, expert)
        matrices = split(layout, reader.read(layer, expert))
        for tensor, tensor_offset in stacked:
            packing = layout.down if MATRICES[tensor.matrix] == "down" else layout.gate_up
            _, rows, columns = tensor.shape
            offset = tensor_offset + expert * tensor.expert_bytes
            where = f"{tensor.name}, expert {expert}"
            stored = matrices[tensor.matrix]
            for chunk in encoded_chunks(packing, stored, rows, columns, tensor.kind, where):
                self._write(chunk, offset)
                offset += chunk.numel()
        reader.forget(layer, expert)

    def _write(self, rows: torch.Tensor, offset: int) -> None:
        self._file.write_at(rows.contiguous().numpy().reshape(-1).data, offset)
        self._done += rows.numel()
        self._progress("exporting", self._done, self._plan.total_bytes)


def rotary_order(rows: int, heads: int) -> torch.Tensor:
    """Return the order of rows of q or k in GGUF: int64 [rows].

    transformers rotates dimension i of a head together with i + half; llama.cpp rotates
    neighbours. So the halves of each head are interleaved.
    """
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def _check_disk(out: Path, needed_bytes: int) -> None:
    free_bytes = free_disk_bytes(out.absolute().parent)
    if needed_bytes > free_bytes:
        raise DoesNotFitError(
            f"{out}: the file needs {needed_bytes} bytes, free are {free_bytes}",
            "free some space, or choose another disk",
        )
