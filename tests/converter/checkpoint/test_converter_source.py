"""Source checkpoints: the accepted ones, and the errors for the others."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from make_checkpoint import SHAPES, make_checkpoint
from safetensors.torch import load_file, save_file
from source_folders import edit_json

from converter.checkpoint.names import ExpertTensor
from converter.checkpoint.source import Checkpoint
from formats.errors import PathError, SourceError

GATE = "model.layers.0.block_sparse_moe.experts.1.w1.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path / "mini", SHAPES["mini"], 2, shards=2)
    return tmp_path / "mini"


def refuse(folder: Path, *words: str, error: type[Exception] = SourceError) -> None:
    with pytest.raises(error) as caught:
        Checkpoint(folder)
    for word in words:
        assert word in str(caught.value)


def edit_tensors(path: Path, **changes: Any) -> None:
    tensors = load_file(path)
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, path)


def single(tmp_path: Path, **options: Any) -> Path:
    make_checkpoint(tmp_path / "single", SHAPES["mini"], 2, **options)
    return tmp_path / "single"


def test_per_expert_and_fused_layouts_give_the_same_weights(source: Path, tmp_path: Path) -> None:
    fused = single(tmp_path, layout="fused")
    with Checkpoint(source) as one, Checkpoint(fused) as other:
        assert one.experts.keys() == other.experts.keys()
        assert one.trunk.keys() == other.trunk.keys()
        for key, weight in one.experts.items():
            rows = weight.shape[0]
            assert torch.equal(
                one.read_rows(weight, 0, rows), other.read_rows(other.experts[key], 0, rows)
            )


def test_rows_are_read_at_their_place(source: Path) -> None:
    with Checkpoint(source) as checkpoint:
        weight = checkpoint.experts[ExpertTensor(0, 1, "gate")]
        whole = load_file(source / weight.shard)[GATE]
        assert torch.equal(checkpoint.read_rows(weight, 5, 40), whole[5:40])


def test_tied_head_needs_no_lm_head(tmp_path: Path) -> None:
    with Checkpoint(single(tmp_path, tied=True)) as checkpoint:
        assert "lm_head.weight" not in checkpoint.trunk


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_other_float_types_are_read(tmp_path: Path, dtype: str) -> None:
    with Checkpoint(single(tmp_path, dtype=dtype)) as checkpoint:
        weight = checkpoint.trunk["model.norm.weight"]
        assert checkpoint.read_rows(weight, 0, 64).float().tolist() == [1.0] * 64


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/passwd",
        "a\\b.safetensors",
        "%2e%2e/x.safetensors",
        "x\0.safetensors",
        "",
        ".",
        "a//b",
    ],
)
def test_unsafe_name_in_weight_map_is_refused(source: Path, name: str) -> None:
    index = source / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=weight_map | {GATE: name})
    refuse(source, "weight_map", GATE, repr(name), error=PathError)


def test_shard_name_that_is_no_string_is_refused(source: Path) -> None:
    edit_json(source / "model.safetensors.index.json", weight_map={GATE: 7})
    refuse(source, "weight_map", GATE, "7")


def test_links_of_the_users_own_folder_are_followed(source: Path, tmp_path: Path) -> None:
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"):
        (source / name).rename(tmp_path / f"elsewhere-{name}")
        (source / name).symlink_to(tmp_path / f"elsewhere-{name}")
    with Checkpoint(source) as checkpoint:
        assert len(checkpoint.shards) == 2


def test_links_of_a_hub_cache_are_followed(source: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--me--mini" / "snapshots" / "0123abc"
    blobs = tmp_path / "models--me--mini" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        file.rename(blobs / f"blob{number}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"blob{number}")
    with Checkpoint(snapshot) as checkpoint:
        assert len(checkpoint.shards) == 2


def test_fifo_is_refused_without_waiting(source: Path) -> None:
    shard = source / "model-00001-of-00002.safetensors"
    shard.unlink()
    os.mkfifo(shard)
    refuse(source, shard.name, "not a regular file", error=PathError)


def test_missing_shard_is_named(source: Path) -> None:
    (source / "model-00002-of-00002.safetensors").unlink()
    refuse(source, "model-00002-of-00002.safetensors", "missing")


def test_pickles_are_never_read(tmp_path: Path) -> None:
    folder = single(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuse(folder, "pytorch_model.bin", "pickled")


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "llama"},
        {"architectures": ["LlamaForCausalLM"]},
        {"hidden_act": "gelu"},
        {"quantization_config": {}},
    ],
)
def test_config_that_is_no_plain_mixtral_is_refused(source: Path, changes: dict[str, Any]) -> None:
    edit_json(source / "config.json", **changes)
    refuse(source, "config.json", next(iter(changes)))


@pytest.mark.parametrize("value", [None, -1, 0, 1.5, True, 2**63, "64"])
def test_bad_number_in_config_names_its_field(source: Path, value: Any) -> None:
    edit_json(source / "config.json", hidden_size=value)
    refuse(source, "config.json", "hidden_size")


def test_header_with_a_doubled_key_is_refused(tmp_path: Path) -> None:
    folder = single(tmp_path)
    shard = folder / "model.safetensors"
    data = shard.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length].rstrip()
    first = next(iter(json.loads(header)))
    header = (
        header[:-1]
        + f',"{first}":'.encode()
        + json.dumps(json.loads(header)[first]).encode()
        + b"}"
    )
    shard.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    refuse(folder, "model.safetensors", first, "twice")


def test_header_with_leading_space_is_refused(tmp_path: Path) -> None:
    folder = single(tmp_path)
    shard = folder / "model.safetensors"
    data = shard.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    shard.write_bytes(struct.pack("<Q", length + 1) + b" " + data[8:])
    refuse(folder, "model.safetensors", "header begins with")


def test_cut_shard_is_refused_before_anything_is_read(source: Path) -> None:
    shard = source / "model-00001-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 100)
    refuse(source, shard.name, "cut off")


def test_wrong_shape_names_the_tensor_and_both_shapes(tmp_path: Path) -> None:
    folder = single(tmp_path)
    edit_tensors(folder / "model.safetensors", **{GATE: torch.zeros(96, 32, dtype=torch.bfloat16)})
    refuse(folder, "model.safetensors", GATE, "[96, 32]", "[96, 64]")


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    folder = single(tmp_path)
    edit_tensors(folder / "model.safetensors", **{GATE: torch.zeros(96, 64, dtype=torch.int8)})
    refuse(folder, GATE, "I8")


def test_missing_expert_is_named(tmp_path: Path) -> None:
    folder = single(tmp_path)
    edit_tensors(folder / "model.safetensors", **{GATE: None})
    refuse(folder, "1 tensors are missing", "layer 0 expert 1 gate")


def test_tensor_of_an_adapter_is_refused(tmp_path: Path) -> None:
    folder = single(tmp_path)
    edit_tensors(
        folder / "model.safetensors",
        **{"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 64)},
    )
    refuse(folder, "lora_A", "do not belong")


def test_expert_beyond_the_config_is_refused(tmp_path: Path) -> None:
    folder = single(tmp_path)
    edit_json(folder / "config.json", num_local_experts=3)
    refuse(folder, "gate.weight", "[4, 64]", "[3, 64]")


def test_same_weight_under_two_names_is_refused(tmp_path: Path) -> None:
    folder = single(tmp_path)
    router = torch.zeros(4, 64, dtype=torch.bfloat16)
    edit_tensors(folder / "model.safetensors", **{"model.layers.0.mlp.gate.weight": router})
    refuse(folder, "block_sparse_moe.gate.weight", "mlp.gate.weight", "same weight")


def test_repo_name_that_is_no_folder_says_how_to_fetch_it() -> None:
    refuse(Path("mistralai/Mixtral-8x7B-v0.1"), "hf download mistralai/Mixtral-8x7B-v0.1")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weight_that_is_not_finite_is_found_with_its_place(tmp_path: Path, value: float) -> None:
    folder = single(tmp_path)
    gate = load_file(folder / "model.safetensors")[GATE]
    gate[70, 3] = value
    edit_tensors(folder / "model.safetensors", **{GATE: gate})
    with Checkpoint(folder) as checkpoint:
        weight = checkpoint.experts[ExpertTensor(0, 1, "gate")]
        checkpoint.check_finite(weight, 0, checkpoint.read_rows(weight, 0, 64))
        with pytest.raises(
            SourceError, match=r"experts\.1\.w1\.weight has 1 NaN.*, the first at \[70, 3\]"
        ):
            checkpoint.check_finite(weight, 64, checkpoint.read_rows(weight, 64, 96))
