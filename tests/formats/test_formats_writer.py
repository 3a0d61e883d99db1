"""Layer files have the same bytes for any order of writes, any threads, and after a kill."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import xxhash
from make_vectors import expert_blob, write_folder
from safetensors import safe_open

from formats.artifact import Artifact
from formats.expert import ExpertLayout
from formats.files.partial_file import partial_path
from formats.layer_file import aligned, layer_file_name
from formats.packing import PACKINGS
from formats.writer import LayerWriter

LAYOUTS = [
    ExpertLayout(40, 300, PACKINGS[gate_up], PACKINGS[down])
    for gate_up, down in (
        ("tile32-q2-g16-s4", "tile32-q2-g16-s4"),
        ("tile32-q2-g16-s4", "tile32-q3-g32-s4"),
        ("tile32-q4-g64-s8", "tile32-q3-g64-s8"),
        ("tile32-q2-g16-s8", "tile32-q2-g16-s4"),
    )
]
MODULE = "model.layers.3.mlp.experts"
BLOBS = [expert_blob(layout, expert) for expert, layout in enumerate(LAYOUTS)]


def written(path: Path, order: list[int]) -> bytes:
    with LayerWriter(path, 3, MODULE, LAYOUTS) as writer:
        for expert in order:
            writer.write_expert(expert, BLOBS[expert])
        writer.finish()
    return path.read_bytes()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return written(tmp_path_factory.mktemp("reference") / "layer.safetensors", [0, 1, 2, 3])


@pytest.mark.parametrize("order", [[3, 2, 1, 0], [1, 3, 0, 2], [0, 0, 1, 2, 3, 1]])
def test_experts_in_any_order_give_the_same_bytes(
    tmp_path: Path, reference: bytes, order: list[int]
) -> None:
    assert written(tmp_path / "layer.safetensors", order) == reference


def test_experts_from_several_threads_give_the_same_bytes(tmp_path: Path, reference: bytes) -> None:
    path = tmp_path / "layer.safetensors"
    with LayerWriter(path, 3, MODULE, LAYOUTS) as writer, ThreadPoolExecutor(4) as pool:
        list(pool.map(writer.write_expert, [3, 1, 0, 2] * 4, [BLOBS[e] for e in [3, 1, 0, 2] * 4]))
        writer.finish()
    assert path.read_bytes() == reference


def test_expert_written_wrong_and_then_again_gives_the_same_bytes(
    tmp_path: Path, reference: bytes
) -> None:
    path = tmp_path / "layer.safetensors"
    with LayerWriter(path, 3, MODULE, LAYOUTS) as writer:
        writer.write_expert(2, 255 - BLOBS[2])
    assert not path.exists()
    assert written(path, [0, 1, 2, 3]) == reference


def test_work_left_by_a_kill_is_kept(tmp_path: Path, reference: bytes) -> None:
    path = tmp_path / "layer.safetensors"
    with LayerWriter(path, 3, MODULE, LAYOUTS) as writer:
        for expert in (0, 2):
            writer.write_expert(expert, BLOBS[expert])
    assert written(path, [1, 3]) == reference


def test_rubbish_of_the_same_size_left_by_another_run_does_not_show(
    tmp_path: Path, reference: bytes
) -> None:
    path = tmp_path / "layer.safetensors"
    partial_path(path).write_bytes(b"\xff" * len(reference))
    assert written(path, [0, 1, 2, 3]) == reference


def test_rubbish_of_another_size_left_by_another_run_does_not_show(
    tmp_path: Path, reference: bytes
) -> None:
    path = tmp_path / "layer.safetensors"
    partial_path(path).write_bytes(b"\xff" * (len(reference) + 5))
    assert written(path, [0, 1, 2, 3]) == reference


def test_only_finishing_gives_the_file_its_name(tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    with LayerWriter(path, 3, MODULE, LAYOUTS) as writer:
        assert [p.name for p in tmp_path.iterdir()] == ["layer.safetensors.partial"]
        writer.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["layer.safetensors"]


def test_size_and_places_are_known_before_the_first_weight(
    tmp_path: Path, reference: bytes
) -> None:
    with LayerWriter(tmp_path / "layer.safetensors", 3, MODULE, LAYOUTS) as writer:
        assert (
            partial_path(tmp_path / "layer.safetensors").stat().st_size
            == writer.size_bytes
            == len(reference)
        )
        assert reference.startswith(writer.header)
        for expert, offset in enumerate(writer.offsets):
            assert reference[offset : offset + LAYOUTS[expert].n_bytes] == bytes(BLOBS[expert])


def test_checksums_of_a_written_expert_are_those_of_its_bytes(tmp_path: Path) -> None:
    with LayerWriter(tmp_path / "layer.safetensors", 3, MODULE, LAYOUTS) as writer:
        assert writer.write_expert(1, BLOBS[1]) == (
            hashlib.sha256(bytes(BLOBS[1])).hexdigest(),
            xxhash.xxh3_128_hexdigest(bytes(BLOBS[1])),
        )


@pytest.mark.parametrize(
    "blob", [torch.zeros(5, dtype=torch.uint8), torch.zeros(LAYOUTS[0].n_bytes)]
)
def test_expert_of_another_size_or_type_is_not_written(tmp_path: Path, blob: torch.Tensor) -> None:
    with (
        LayerWriter(tmp_path / "layer.safetensors", 3, MODULE, LAYOUTS) as writer,
        pytest.raises(ValueError, match="its layout takes uint8"),
    ):
        writer.write_expert(0, blob)


def test_layer_file_holds_each_expert_as_two_tensors(tmp_path: Path, reference: bytes) -> None:
    (tmp_path / "layer.safetensors").write_bytes(reference)
    with safe_open(tmp_path / "layer.safetensors", "pt") as f:
        for expert, (layout, blob) in enumerate(zip(LAYOUTS, BLOBS, strict=True)):
            name = f"model.layers.3.mlp.experts.{expert}"
            parts = [f.get_tensor(f"{name}.{part}") for part in ("gate_up", "down")]
            assert [tuple(part.shape) for part in parts] == [
                layout.gate_up_shape,
                layout.down_shape,
            ]
            assert torch.equal(torch.cat([part.view(-1) for part in parts]), blob)


def test_fillers_are_zero(reference: bytes, tmp_path: Path) -> None:
    with LayerWriter(tmp_path / "layer.safetensors", 3, MODULE, LAYOUTS) as writer:
        ends = [
            offset + layout.n_bytes for offset, layout in zip(writer.offsets, LAYOUTS, strict=True)
        ]
    assert any(end % 4096 for end in ends)
    assert not any(any(reference[end : aligned(end)]) for end in ends)


def test_compressed_layer_is_the_same_twice(tmp_path: Path) -> None:
    files = [write_folder(tmp_path / str(run), codec="zstd") / layer_file_name(0) for run in (0, 1)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_compressing_leaves_no_other_file(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", codec="zstd")
    assert [p.name for p in (folder / "experts").iterdir()] == ["layer-000.safetensors"]
    Artifact.open(folder)
