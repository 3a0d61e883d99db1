"""Experts in plain rows: place of their weights, view of other programs, format versions."""

import shutil
from pathlib import Path

import pytest
import torch
from bad_folders import VECTORS, set_json
from expert_bytes import assemble
from make_vectors import CONFIG, expert_blob, write_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from formats.artifact import Artifact
from formats.errors import FormatError, VersionError
from formats.expert import ExpertLayout, gate_and_up, sections, split
from formats.index import read_index
from formats.packing import AnyPacking, packing_named
from formats.reading.direct_reader import DirectReader
from formats.reading.verify import verify_folder
from formats.repair.index_rebuild import rebuild_index
from formats.repair.repairs import NoOrigin, repair_folder
from formats.tiles import expert_weights, matrix_weights

Q2, Q4, BF16, F16 = "tile32-q2-g16-s4", "tile32-q4-g64-s8", "rows-bf16", "rows-f16"
PAIRS = [(BF16, BF16), (F16, F16), (BF16, Q2), (Q4, F16), (Q2, Q4)]
LAYER = "experts/layer-000.safetensors"


def layout_of(gate_up: str, down: str) -> ExpertLayout:
    """Return a layout whose sizes are not multiples of 32."""
    return ExpertLayout(72, 40, packing_named(gate_up), packing_named(down))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(VECTORS / "folder-rows", tmp_path / "folder"))


def test_gate_stands_before_up_and_up_before_down() -> None:
    layout = layout_of(BF16, F16)
    gate = torch.full((40, 72), 1.0, dtype=torch.bfloat16)
    down = torch.full((72, 40), 3.0, dtype=torch.float16)
    blob = assemble(layout, gate, 2 * gate, down)
    matrix = 2 * 40 * 72
    for i, (dtype, number) in enumerate(
        [(torch.bfloat16, 1.0), (torch.bfloat16, 2.0), (torch.float16, 3.0)]
    ):
        assert blob[i * matrix : (i + 1) * matrix].view(dtype).tolist() == [number] * (40 * 72)
    assert len(blob) == layout.n_bytes == 3 * matrix


@pytest.mark.parametrize("pair", PAIRS)
def test_parts_are_views_of_the_blob_that_assemble_to_it(pair: tuple[str, str]) -> None:
    layout = layout_of(*pair)
    blob = expert_blob(layout, 1)
    parts = split(layout, blob)
    assert torch.equal(assemble(layout, *parts), blob)
    begin, end = blob.data_ptr(), blob.data_ptr() + len(blob)
    assert all(begin <= part.data_ptr() < end for part in (*parts, *sections(layout, blob)))
    assert [tuple(part.shape) for part in sections(layout, blob)] == [
        layout.gate_up_shape,
        layout.down_shape,
    ]


def test_weights_of_rows_are_the_stored_numbers() -> None:
    layout = layout_of(BF16, F16)
    blob = expert_blob(layout, 1)
    for weights, stored in zip(expert_weights(layout, blob), split(layout, blob), strict=True):
        assert weights.dtype is torch.float32
        assert torch.equal(weights, stored.float())


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("pair", PAIRS)
def test_products_with_the_whole_section_are_told_apart(pair: tuple[str, str], tokens: int) -> None:
    layout = layout_of(*pair)
    blob = expert_blob(layout, 2)
    x = torch.randn(tokens, 72, generator=torch.Generator().manual_seed(0))
    stored, _ = sections(layout, blob)
    packing: AnyPacking = layout.gate_up
    rows = len(stored) * packing.rows_each
    found = gate_and_up(layout, x @ matrix_weights(packing, stored, rows, 72).T)
    for part, weights in zip(found, expert_weights(layout, blob), strict=False):
        torch.testing.assert_close(part, x @ weights.T)


def test_blob_of_another_size_is_refused() -> None:
    with pytest.raises(FormatError, match="expert of 8 bytes"):
        split(layout_of(BF16, BF16), torch.zeros(8, dtype=torch.uint8))


def test_other_programs_see_matrices() -> None:
    artifact = Artifact.open(VECTORS / "folder-rows")
    with safe_open(VECTORS / "folder-rows" / LAYER, "pt") as file, DirectReader(artifact) as reader:
        for expert in (0, 1):
            gate, up, down = split(artifact.layout(0, expert), reader.read(0, expert))
            prefix = f"model.layers.0.mlp.experts.{expert}"
            assert torch.equal(file.get_tensor(f"{prefix}.gate_up"), torch.cat([gate, up]))
            assert torch.equal(file.get_tensor(f"{prefix}.down"), down)
            assert (gate.dtype, down.dtype) == (torch.bfloat16, torch.float16)


def test_experts_begin_at_multiples_of_4096(tmp_path: Path) -> None:
    config = {**CONFIG, "hidden_size": 40, "intermediate_size": 24}
    index = read_index(write_folder(tmp_path / "f", packings=(BF16, BF16), config=config))
    assert [(e.offset % 4096, e.length) for e in index.layers[0].experts] == [
        (0, 3 * 40 * 24 * 2)
    ] * 2
    assert verify_folder(tmp_path / "f", read_data=True).problems == []


@pytest.mark.parametrize(
    ("version", "hint"),
    [(1, "convert the source again"), (2, "convert the source again"), (4, "update moe-convert")],
)
def test_folder_of_another_version_is_refused_with_both_versions(
    folder: Path, version: int, hint: str
) -> None:
    edit(folder, "/format_version", str(version))
    with pytest.raises(
        VersionError, match=f"format_version is {version}; this release reads 3"
    ) as caught:
        Artifact.open(folder)
    assert caught.value.hint == hint


def edit(folder: Path, pointer: str, raw: str) -> None:
    path = folder / "moe_index.json"
    path.write_bytes(set_json(path.read_bytes(), pointer, raw))


def test_rows_in_the_trunk_are_refused(folder: Path) -> None:
    edit(folder, "/trunk/packed/model.layers.0.self_attn.k_proj/packing", '"rows-bf16"')
    with pytest.raises(
        FormatError, match="k_proj: packing 'rows-bf16' is unknown; known are tile32-q2"
    ):
        Artifact.open(folder)


def test_other_dtype_than_the_indexs_is_refused(folder: Path) -> None:
    for expert in (0, 1):
        edit(folder, f"/layers/0/experts/{expert}/gate_up", '"rows-f16"')
    edit(folder, "/packings", '["rows-f16", "tile32-q4-g64-s8"]')
    with pytest.raises(
        FormatError, match=r"gate_up' is BF16 \[64, 32\].* the index says F16 \[64, 32\]"
    ):
        Artifact.open(folder)


def test_index_is_rebuilt_to_the_same_bytes(folder: Path) -> None:
    before = (folder / "moe_index.json").read_bytes()
    edit(folder, "/layers", "[]")
    rebuild_index(folder)
    assert (folder / "moe_index.json").read_bytes() == before


def test_file_that_was_saved_again_gets_its_layout_back(folder: Path) -> None:
    before = (folder / LAYER).read_bytes()
    save_file(
        {name: t.clone() for name, t in sorted(load_file(folder / LAYER).items())}, folder / LAYER
    )
    index = read_index(folder)
    assert repair_folder(folder, index, NoOrigin("")).files == [LAYER]
    assert (folder / LAYER).read_bytes() == before
