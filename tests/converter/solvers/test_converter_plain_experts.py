"""Experts in 16 bits: the source's weights bit for bit, without solver or calibration, also mixed
with quantized ones.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from inside import inside
from interrupted_runs import Interruption, hashes, stop_after
from make_checkpoint import SHAPES, make_checkpoint
from safetensors.torch import load_file, save_file

from converter.calibration.calibration_pass import CalibrationPass
from converter.checkpoint.names import ExpertTensor
from converter.checkpoint.source import Checkpoint
from converter.cli.main import cli
from converter.convert import ConvertOptions, convert_checkpoint
from converter.output.planned_folder import PlannedFolder
from converter.recipe.recipe_file import recipe_settings
from converter.recipe.recipes import make_recipe
from converter.solvers.native import solver_library
from converter.source_origin import SourceOrigin
from formats import FORMAT_VERSION
from formats.artifact import Artifact
from formats.errors import RecipeError, SourceError
from formats.expert import split
from formats.index import read_index
from formats.packing import Packing
from formats.reading.direct_reader import DirectReader
from formats.reading.verify import verify_folder
from formats.repair.repairs import repair_folder

RANDOM: dict[str, Any] = {"calibrate": "random", "calibration_tokens": 1024}


def checkpoint_of(folder: Path, dtype: str, **options: Any) -> Path:
    make_checkpoint(folder, SHAPES["mini"], 3, dtype=dtype, **options)
    return folder


def convert(source: Path, out: Path, name: str = "16bit", workers: int = 1, **options: Any) -> Path:
    convert_checkpoint(
        source, out, make_recipe(name, **options), ConvertOptions(max_workers=workers)
    )
    return out


def stored_and_source(out: Path, source: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each projection that is in rows, and the source's weights."""
    artifact, pairs = Artifact.open(out), []
    with Checkpoint(source) as checkpoint, DirectReader(artifact) as reader:
        for layer in range(artifact.architecture.num_hidden_layers):
            for expert in range(artifact.architecture.num_local_experts):
                layout = artifact.layout(layer, expert)
                parts = split(layout, reader.read(layer, expert).clone())
                for projection, stored in zip(("gate", "up", "down"), parts, strict=True):
                    weight = checkpoint.experts[ExpertTensor(layer, expert, projection)]
                    packing = layout.down if projection == "down" else layout.gate_up
                    if not isinstance(packing, Packing):
                        pairs.append((stored, checkpoint.read_rows(weight, 0, weight.shape[0])))
    return pairs


@pytest.mark.parametrize("layout", ["experts", "fused"])
@pytest.mark.parametrize(("dtype", "packing"), [("BF16", "rows-bf16"), ("F16", "rows-f16")])
def test_weights_are_the_sources_to_the_bit(
    tmp_path: Path, dtype: str, packing: str, layout: str
) -> None:
    source = checkpoint_of(tmp_path / "mini", dtype, layout=layout)
    out = convert(source, tmp_path / "out")
    pairs = stored_and_source(out, source)
    assert len(pairs) == 3 * 4 * 3
    assert all(a.dtype is b.dtype and torch.equal(a, b) for a, b in pairs)
    index = read_index(out)
    assert (index.packings, index.format_version) == ([packing], FORMAT_VERSION)
    assert (index.recipe.name, index.recipe.solver, index.producer.versions) == (
        "16bit",
        "none",
        {"solver": "none"},
    )
    assert (
        json.loads((out / "config.json").read_text())["quantization_config"]["format_version"]
        == FORMAT_VERSION
    )
    assert verify_folder(out, read_data=True).problems == []


def test_fp32_is_rounded_to_bf16_and_quality_says_how_much_that_lost(tmp_path: Path) -> None:
    source = checkpoint_of(tmp_path / "mini", "F32")
    path = source / "model.safetensors"
    rng = torch.Generator().manual_seed(0)
    noisy = {n: t + 1e-4 * torch.randn(t.shape, generator=rng) for n, t in load_file(path).items()}
    save_file(noisy, path)
    out = convert(source, tmp_path / "out")
    pairs = stored_and_source(out, source)
    assert all(torch.equal(a, b.bfloat16()) for a, b in pairs)
    off, whole = (
        sum(float(f(a, b)) for a, b in pairs)
        for f in (
            lambda a, b: (a.double() - b.double()).square().sum(),
            lambda a, b: b.double().square().sum(),
        )
    )
    said = json.loads((out / "quality.json").read_text())["totals"]["experts"]
    assert said == pytest.approx((off / whole) ** 0.5, rel=1e-4)
    assert 0.0005 < said < 0.003


def test_bf16_may_be_asked_for_as_f16_where_it_fits(source: Path, tmp_path: Path) -> None:
    out = convert(source, tmp_path / "out", gate_up="rows-f16", down="rows-bf16")
    assert read_index(out).packings == ["rows-bf16", "rows-f16"]
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in stored_and_source(out, source))


def test_weight_beyond_f16_is_refused_with_what_to_do(tmp_path: Path) -> None:
    source = checkpoint_of(tmp_path / "mini", "BF16")
    path = source / "model.safetensors"
    tensors = load_file(path)
    next(t for n, t in tensors.items() if ".w3." in n)[3, 5] = 1e6
    save_file(tensors, path)
    with pytest.raises(SourceError, match=r"up to .* do not fit into rows-f16") as caught:
        convert(source, tmp_path / "out", gate_up="rows-f16")
    assert caught.value.hint == "use rows-bf16"


def test_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    source = checkpoint_of(tmp_path / "mini", "BF16")
    path = source / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if ".w2." in n)
    tensors[name][3, 5] = float("nan")
    save_file(tensors, path)
    with pytest.raises(SourceError, match=rf"{name} has 1 NaN.* \[3, 5\]"):
        convert(source, tmp_path / "out")


def test_no_calibration_runs_where_nothing_is_quantized(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        CalibrationPass, "__init__", lambda *args, **options: pytest.fail("calibrates")
    )
    by_bits = convert(source, tmp_path / "bits", "2bit", bits=16, attn_bits=16, **RANDOM)
    by_rule = convert(source, tmp_path / "rule", "2bit", rules=["*=16bit"], attn_bits=16, **RANDOM)
    assert "calibration" not in read_index(by_rule).producer.versions
    files = [path.relative_to(by_bits) for path in by_bits.rglob("*.safetensors")]
    assert all((by_bits / file).read_bytes() == (by_rule / file).read_bytes() for file in files)
    # The same again is complete, not something else.
    recipe = make_recipe("2bit", rules=["*=16bit"], attn_bits=16, **RANDOM)
    assert convert_checkpoint(source, by_rule, recipe).done == "already complete"


@pytest.mark.parametrize(
    ("options", "name", "solver"),
    [
        ({"name": "16bit"}, "16bit", "none"),
        ({"bits": 16, "attn_bits": 16}, "16bit", "none"),
        ({"bits": 16, "attn_bits": 16, "solver": "hqq", "calibrate": "builtin"}, "16bit", "none"),
        ({"bits": 16}, "custom", "refit"),
        ({"bits": 16, "calibrate": "builtin"}, "custom", "feedback"),
        ({"name": "paper-2bit", "bits": 16}, "custom", "hqq"),
        ({"name": "16bit", "attn_bits": 4}, "custom", "refit"),
        ({"name": "16bit", "rules": ["1=2bit"]}, "custom", "feedback"),
        ({"name": "2bit", "rules": ["1=16bit"]}, "custom", "feedback"),
        ({"name": "2bit", "gate_up": "rows-bf16"}, "custom", "feedback"),
    ],
    ids=str,
)
def test_solver_is_that_of_what_is_quantized(
    options: dict[str, Any], name: str, solver: str
) -> None:
    recipe = make_recipe(**options)
    assert (recipe.name, recipe.solver, "calibrate" in recipe.recorded.options) == (
        name,
        solver,
        solver == "feedback",
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 16, "group_size": 64}, "16 bits in groups of 64"),
        ({"name": "16bit", "group_size": 16}, "16 bits in groups of 16"),
        ({"bits": 16, "target_bpw": 2.7}, "target-bpw"),
        ({"solver": "none"}, "the solver none quantizes nothing"),
        ({"down": "rows-f32"}, "'rows-f32' is unknown.*rows-bf16"),
        ({"rules": ["0=rows"]}, "'rows' is unknown.*16bit"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        make_recipe(**options)


def test_file_may_say_16_bits(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('{"bits": 16, "attn_bits": 16, "rules": ["0/down=2bit"]}')
    recipe = make_recipe(**recipe_settings(str(tmp_path / "mine.json")))
    assert (recipe.gate_up, recipe.recorded.options["rule.1"]) == (
        "none",
        "0/down=tile32-q2-g16-s4",
    )


def test_option_may_be_called_expert_bits_and_a_dry_run_says_the_sizes(source: Path) -> None:
    args = [
        "convert",
        str(source),
        "--expert-bits",
        "16",
        "--attn-bits",
        "16",
        "--dry-run",
        "--json",
        "-q",
    ]
    facts = json.loads(CliRunner().invoke(cli, args).output)
    assert (facts["recipe"], facts["solver"], facts["calibration"]) == ("16bit", "none", "none")
    assert facts["expert_bits"] == facts["attention_bits"] == 16
    assert facts["expert_bytes"] == 3 * 64 * 96 * 2


def test_config_alone_gives_the_sizes_of_the_folder(source: Path, tmp_path: Path) -> None:
    artifact = Artifact.open(
        convert(source, tmp_path / "out", "2bit", rules=["1=16bit"], solver="hqq")
    )
    planned = PlannedFolder.plan(source, make_recipe("2bit", rules=["1=16bit"], solver="hqq"))
    assert [planned.layout(n, 0) for n in range(3)] == [artifact.layout(n, 0) for n in range(3)]


@pytest.mark.parametrize("rules", ["*=16bit", "0=16bit,1/down=16bit,2:1=16bit"])
def test_workers_and_interruptions_change_no_byte(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rules: str
) -> None:
    options: dict[str, Any] = {"rules": [rules], **RANDOM}
    expected = hashes(convert(source, tmp_path / "one", "2bit", **options))
    assert hashes(convert(source, tmp_path / "many", "2bit", workers=3, **options)) == expected
    for moment in (2, 4):
        with monkeypatch.context() as patch:
            stop_after(patch, moment)
            with pytest.raises(Interruption):
                convert(source, tmp_path / "stopped", "2bit", **options)
    assert hashes(convert(source, tmp_path / "stopped", "2bit", **options)) == expected


def test_quantized_layers_are_those_of_a_folder_without_rows(source: Path, tmp_path: Path) -> None:
    whole = Artifact.open(convert(source, tmp_path / "whole", "2bit", attn_bits=16, **RANDOM))
    mixed = Artifact.open(
        convert(source, tmp_path / "mixed", "2bit", attn_bits=16, rules=["0,2=16bit"], **RANDOM)
    )
    assert [e.sha256 for e in mixed.index.layers[1].experts] == [
        e.sha256 for e in whole.index.layers[1].experts
    ]
    assert [e.gate_up for layer in mixed.index.layers for e in layer.experts] == [
        *["rows-bf16"] * 4, *["tile32-q2-g16-s4"] * 4, *["rows-bf16"] * 4
    ]  # fmt: skip


def test_statistics_are_gathered_of_quantized_layers_only(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[tuple[int, bool]] = []
    forward = inside(CalibrationPass, "forward")

    def counted(self: CalibrationPass, layer: int, *, gather: bool) -> torch.Tensor:
        passes.append((layer, gather))
        return forward(self, layer, gather=gather)

    monkeypatch.setattr(CalibrationPass, "_forward", counted)
    convert(source, tmp_path / "out", "2bit", attn_bits=16, rules=["0,2=16bit"], **RANDOM)
    assert passes == [(0, False), (1, True)]


def test_down_is_calibrated_by_a_gate_and_up_that_lost_nothing(
    source: Path, tmp_path: Path
) -> None:
    out = convert(source, tmp_path / "out", "2bit", rules=["*/gate_up=16bit"], **RANDOM)
    quality = json.loads((out / "quality.json").read_text())
    assert (quality["totals"]["gate"], quality["totals"]["up"]) == (0, 0)
    assert 0.05 < quality["totals"]["down"] < 0.6
    assert "calibration" in read_index(out).producer.versions


@pytest.mark.parametrize("rules", ["*=16bit", "0=16bit"])
def test_damaged_expert_comes_back_from_the_source(
    source: Path, tmp_path: Path, rules: str
) -> None:
    out = convert(source, tmp_path / "out", "2bit", rules=[rules], **RANDOM)
    before, index = hashes(out), read_index(out)
    entry = index.layers[0].experts[2]
    with open(out / index.layers[0].file, "r+b") as file:
        file.seek(entry.offset + 1000)
        file.write(b"damage")
    with SourceOrigin(source, index) as origin:
        assert repair_folder(out, index, origin).experts == [(0, 2)]
    assert hashes(out) == before


def test_zstd_holds_the_same_weights_in_fewer_bytes(source: Path, tmp_path: Path) -> None:
    recipe = make_recipe("16bit")
    convert_checkpoint(source, tmp_path / "out", recipe, ConvertOptions(codec="zstd"))
    assert all(torch.equal(a, b) for a, b in stored_and_source(tmp_path / "out", source))
    entries = [e for layer in read_index(tmp_path / "out").layers for e in layer.experts]
    assert all(e.length < 3 * 64 * 96 * 2 for e in entries)


def test_model_card_says_that_experts_are_as_in_the_source(source: Path, tmp_path: Path) -> None:
    card = (convert(source, tmp_path / "out") / "README.md").read_text()
    assert "Its experts are as in the source." in card
    assert "| gate and up of the experts | `rows-bf16`, as in the source |" in card
    assert "- quantized" not in card


def test_rows_are_copied_in_bounded_pieces(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    read = Checkpoint.read_rows

    def counted(self: Checkpoint, weight: Any, begin: int, end: int) -> torch.Tensor:
        if "experts" in weight.name:
            rows.append(end - begin)
        return read(self, weight, begin, end)

    expected = hashes(convert(source, tmp_path / "whole"))
    monkeypatch.setattr(Checkpoint, "read_rows", counted)
    monkeypatch.setattr("converter.output.conversion_sizes.CHUNK_WEIGHTS", 32 * 96)
    assert hashes(convert(source, tmp_path / "pieces")) == expected
    assert set(rows) == {32}


def test_without_the_native_library_attention_beside_16_bits_is_quantized_by_hqq(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(solver_library, "available", lambda: False)
    assert (make_recipe(bits=16).solver, make_recipe("16bit").solver) == ("hqq", "none")
