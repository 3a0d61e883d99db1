"""The bytes before the tensors' data: magic, metadata, and each tensor's shape, type and offset."""

import tempfile
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_VERSION, GGUFType, GGUFWriter, size_label

from converter import __version__
from converter.gguf.block_types import FILE_TYPES, Type
from converter.gguf.hyperparameters import add_hyperparameters
from converter.gguf.tensor_plan import Tensor
from converter.gguf.vocabulary import Vocabulary
from formats.artifact import Artifact
from formats.repo_names import is_repo_name, page_address


def build_header(
    artifact: Artifact, tensors: list[Tensor], vocabulary: Vocabulary, license_id: str | None
) -> bytes:
    """Return the file's bytes up to the data, padded to the alignment of tensors."""
    writer = GGUFWriter(None, "llama")
    _add_general(writer, artifact, tensors, license_id)
    add_hyperparameters(writer, artifact)
    writer.add_file_type(FILE_TYPES[_main_type(tensors)])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    vocabulary.add_to(writer)
    for tensor in tensors:
        # The dtype is not used where a type is given.
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.n_bytes, tensor.kind
        )
    with tempfile.TemporaryDirectory(prefix="moe-convert-") as folder:
        path = Path(folder) / "header"
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        data = path.read_bytes()
    return data.ljust(padded(len(data)), b"\0")


def padded(n_bytes: int) -> int:
    """Return `n_bytes` rounded up to the alignment of tensors, 32."""
    return GGUFWriter.ggml_pad(n_bytes, 32)


def _add_general(
    writer: GGUFWriter, artifact: Artifact, tensors: list[Tensor], license_id: str | None
) -> None:
    source = artifact.index.source
    owner, _, name = source.name.rpartition("/")
    writer.add_type(GGUFType.MODEL)
    writer.add_name(name)
    writer.add_size_label(_size_label(tensors))
    writer.add_quantized_by(f"moe-convert {__version__}")
    if license_id:
        writer.add_license(license_id)
    if is_repo_name(source.name):
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, name)
        writer.add_base_model_organization(0, owner)
        writer.add_base_model_repo_url(0, page_address(source.name))
        if source.revision:
            writer.add_base_model_version(0, source.revision)


def _main_type(tensors: list[Tensor]) -> Type:
    """Return the type that most weights have."""
    weights: dict[Type, int] = {}
    for tensor in tensors:
        weights[tensor.kind] = weights.get(tensor.kind, 0) + tensor.n_weights
    return max(weights, key=lambda kind: weights[kind])


def _size_label(tensors: list[Tensor]) -> str:
    """Return the size as model pages write it, such as 8x7B."""
    stacked = [tensor for tensor in tensors if "_exps." in tensor.name]
    experts = stacked[0].shape[0]
    one_expert = sum(tensor.n_weights for tensor in stacked) // experts
    total = sum(tensor.n_weights for tensor in tensors)
    return size_label(total, total - one_expert * experts, one_expert, experts)
