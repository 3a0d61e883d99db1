"""Calibrated conversions: the model's statistics, the same bytes by every way, and errors that name
bad input.
"""

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated_runs import convert
from inside import inside
from interrupted_runs import Interruption, hashes, stop_after
from make_checkpoint import SHAPES, make_checkpoint
from safetensors.torch import load_file, save_file

from converter.calibration import calibration_pass
from converter.calibration.calibration_pass import STATE_FOLDER, CalibrationPass
from converter.calibration.calibration_text import CalibrationTokens, calibration_tokens
from converter.calibration.layer_statistics import (
    DOWN_BLOCK,
    PRIOR_SHARE,
    ExpertInputs,
    LayerStatistics,
)
from converter.calibration.state_file import write_state
from converter.checkpoint.source import Checkpoint
from converter.solvers import feedback
from formats.errors import OutputError, SourceError
from formats.index import read_index
from formats.reading.verify import verify_folder

pytestmark = pytest.mark.usefixtures("reference_solver")


@pytest.fixture(scope="module")
def reference(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feedback, "NativeFeedback", feedback.ReferenceFeedback)
        out = tmp_path_factory.mktemp("reference") / "out"
        convert(source, out)
    return hashes(out)


def one_by_one(tasks: Any) -> list[Any]:
    return [task() for task in tasks]


def passing(
    source: Path, folder: Path, tokens: CalibrationTokens, checkpoint: Checkpoint
) -> CalibrationPass:
    return CalibrationPass(checkpoint, tokens, folder, "test", one_by_one)


def moment(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


@pytest.fixture
def float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_pass, "fast_products", lambda _: torch.float32)


@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize("layer", [0, 2])
def test_statistics_are_those_of_the_transformers_model(
    source: Path, tmp_path: Path, layer: int
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    inputs: dict[str, torch.Tensor] = {}
    block = model.model.layers[layer]
    for name, module in (
        ("q", block.self_attn.q_proj),
        ("o", block.self_attn.o_proj),
        ("mlp", block.mlp.gate),
    ):
        module.register_forward_pre_hook(
            lambda _, args, name=name: inputs.__setitem__(name, args[0].flatten(0, -2))
        )
    with Checkpoint(source) as checkpoint:
        tokens = calibration_tokens(checkpoint, "random", 1024)
        passes = passing(source, tmp_path, tokens, checkpoint)
        statistics = passes.prepare(layer)
        prefix = f"model.layers.{layer}.self_attn"
        with torch.no_grad():
            model(input_ids=tokens.windows, use_cache=False)
            torch.testing.assert_close(
                statistics.linears[f"{prefix}.k_proj"].hessian[0], moment(inputs["q"])
            )
            torch.testing.assert_close(
                statistics.linears[f"{prefix}.o_proj"].hessian[0], moment(inputs["o"])
            )
            *_, chosen = block.mlp.gate(inputs["mlp"])
            here = (chosen == 1).any(1)
            x = inputs["mlp"][here]
            gate_up, count = statistics.gate_up_statistics(1)
            assert count == len(x)
            prior = PRIOR_SHARE * 64
            expected = (len(x) * moment(x) + prior * moment(inputs["mlp"])) / (len(x) + prior)
            torch.testing.assert_close(gate_up.hessian[0], expected)
            rows = block.mlp.experts.gate_up_proj[1].split(96)
            gate, up = (x @ part.T for part in rows)
            h = torch.nn.functional.silu(gate) * up
            down, correction = statistics.down_statistics(
                1, *(lambda b, e, part=part: part[b:e] for part in rows)
            )
            assert correction is not None
            assert float(correction.factor.abs().max()) < 0.01  # nothing is lost, but for bfloat16
        assert down.hessian.shape == (1, DOWN_BLOCK, DOWN_BLOCK)
        share = len(h) / (len(h) + PRIOR_SHARE * DOWN_BLOCK)
        pooled = statistics.down.hessian
        torch.testing.assert_close(
            down.hessian[0, :96, :96], share * moment(h) + (1 - share) * pooled[0, :96, :96]
        )
        assert not down.hessian[0, 96:].any()


@pytest.mark.usefixtures("float32_products")
def test_the_pass_ends_where_the_model_does(source: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with Checkpoint(source) as checkpoint, torch.no_grad():
        tokens = calibration_tokens(checkpoint, "random", 1024)
        passes = passing(source, tmp_path, tokens, checkpoint)
        head = passes.prepare_head().linears["lm_head"]
        expected = moment(
            model.model(input_ids=tokens.windows, use_cache=False).last_hidden_state.flatten(0, 1)
        )
        torch.testing.assert_close(head.hessian[0], expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_products_give_nearly_the_same_statistics(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(calibration_pass, "fast_products", lambda _, dtype=dtype: dtype)
        with Checkpoint(source) as checkpoint:
            passes = passing(
                source, tmp_path, calibration_tokens(checkpoint, "random", 1024), checkpoint
            )
            layer = passes.prepare(2)
            found.append([layer.gate_up_statistics(0)[0].hessian, layer.down.hessian])
    for exact, near in zip(*found, strict=True):
        assert 0 < float((near - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("workers", [2, 5])
def test_any_number_of_workers_gives_the_same_bytes(
    source: Path, reference: dict[str, str], tmp_path: Path, workers: int
) -> None:
    convert(source, tmp_path / "out", max_workers=workers)
    assert hashes(tmp_path / "out") == reference


@pytest.mark.parametrize("moment_of_it", [0, 3, 4, 9])
def test_interruption_is_resumed_to_the_same_bytes(
    source: Path,
    reference: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment_of_it: int,
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, moment_of_it)
        with pytest.raises(Interruption):
            convert(source, out)
    convert(source, out)
    assert hashes(out) == reference
    assert verify_folder(out, read_data=True).problems == []


def test_statistics_of_one_layer_at_a_time_are_in_memory(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = CalibrationPass.prepare
    prepared: list[Any] = []
    alive: list[Any] = []

    def watched(self: CalibrationPass, layer: int, *, gather: bool) -> LayerStatistics:
        gc.collect()
        alive.append(sum(reference() is not None for reference in prepared))
        statistics = prepare(self, layer, gather=gather)
        prepared.append(weakref.ref(statistics))
        return statistics

    monkeypatch.setattr(CalibrationPass, "prepare", watched)
    convert(source, tmp_path / "out", max_workers=2)
    assert alive == [0, 0, 0]


def test_resume_begins_at_the_last_finished_layer(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        with pytest.raises(Interruption):
            convert(source, out)
    assert (out / STATE_FOLDER / "state").exists()
    layers: list[int] = []
    original = inside(CalibrationPass, "forward")
    monkeypatch.setattr(
        CalibrationPass,
        "_forward",
        lambda self, layer, **k: (layers.append(layer), original(self, layer, **k))[1],
    )
    convert(source, out)
    assert layers == [2]
    assert not (out / STATE_FOLDER).exists()


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped", "another"])
def test_lost_or_foreign_state_is_computed_again(
    source: Path,
    reference: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: str,
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        with pytest.raises(Interruption):
            convert(source, out)
    state = out / STATE_FOLDER / "state"
    if damage == "gone":
        state.unlink()
    elif damage == "cut":
        state.write_bytes(state.read_bytes()[:1000])
    elif damage == "flipped":
        data = bytearray(state.read_bytes())
        data[-100] ^= 1
        state.write_bytes(data)
    else:
        with Checkpoint(source) as checkpoint:
            windows = calibration_tokens(checkpoint, "random", 1024).windows
        write_state(state, "another", 2, torch.ones(*windows.shape, 64))
    convert(source, out)
    assert hashes(out) == reference


def test_parts_of_the_layers_add_up_to_the_whole(
    source: Path, reference: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert convert(source, out, part=(2, 2)) == "part"
    assert convert(source, out, part=(1, 2)) == "part"
    convert(source, out)
    assert hashes(out) == reference


def test_resume_with_other_tokens_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of a text\n" for i in range(2000)))
    recipe = {"calibrate": "file"}
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Interruption):
            convert(source, out, recipe, calibration_file=text)
    text.write_text("".join(f"other line {i} of a text\n" for i in range(2000)))
    with pytest.raises(OutputError, match="another calibration"):
        convert(source, out, recipe, calibration_file=text)


def test_complete_folder_by_another_text_is_refused(source: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of a text\n" for i in range(2000)))
    convert(source, out, {"calibrate": "file"}, calibration_file=text)
    assert convert(source, out, {"calibrate": "file"}, calibration_file=text) == "already complete"
    text.write_text("".join(f"other line {i} of a text\n" for i in range(2000)))
    with pytest.raises(OutputError, match=r"another calibration(?s:.*)--force"):
        convert(source, out, {"calibrate": "file"}, calibration_file=text)


def test_index_and_quality_say_how_it_was_calibrated(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, out)
    index = read_index(out)
    assert index.recipe.options == {"calibrate": "random", "calibration_tokens": 1024}
    with Checkpoint(source) as checkpoint:
        assert (
            calibration_tokens(checkpoint, "random", 1024).sha256
            in index.producer.versions["calibration"]
        )
    quality = json.loads((out / "quality.json").read_text())
    assert quality["uncalibrated"] == []
    assert sum(e["calibration_tokens"] for e in quality["experts"] if e["layer"] == 0) == 2 * 1024
    assert "1024 tokens: random" in (out / "README.md").read_text()


def test_head_is_calibrated_too(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", {"head_bits": 4})
    quality = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert 0 < quality["trunk"]["lm_head"] < 0.12
    assert quality["uncalibrated"] == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), r"1 NaN.* the first at \[5\]"),
        (2.0**127, r"largest weight there is 1.70141e\+38.* at \[5\]"),
    ],
)
def test_activations_that_are_not_finite_name_the_weight(
    tmp_path: Path, value: float, message: str
) -> None:
    folder = tmp_path / "mini"
    make_checkpoint(folder, SHAPES["mini"], 3)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"][5] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        SourceError, match=rf"(?s)(?=.*layers\.1\.post_attention_layernorm\.weight).*{message}"
    ):
        convert(folder, tmp_path / "out")


def test_useless_statistics_fall_back_and_are_recorded(tmp_path: Path) -> None:
    folder = tmp_path / "mini"
    make_checkpoint(folder, SHAPES["mini"], 1)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.v_proj.weight"][:] = 0  # so nothing reaches o_proj
    save_file(tensors, folder / "model.safetensors")
    convert(folder, tmp_path / "out")
    quality = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert quality["uncalibrated"] == ["model.layers.0.self_attn.o_proj"]
    assert 0 < quality["trunk"]["model.layers.0.self_attn.o_proj"] < 0.12


def test_expert_that_no_token_reached_gets_its_layers_statistics(
    source: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mini"
    make_checkpoint(folder, SHAPES["mini"], 1)
    tensors = load_file(folder / "model.safetensors")
    router = tensors["model.layers.0.block_sparse_moe.gate.weight"]
    router[0], router[1] = router[2] + 0.01 * router[0], router[2]  # 3 rarely, and 0, 1, 2 tie
    tensors["model.layers.0.post_attention_layernorm.weight"][:] = 1
    tensors["model.layers.0.block_sparse_moe.gate.weight"] = router
    save_file(tensors, folder / "model.safetensors")
    with Checkpoint(folder) as checkpoint:
        passes = passing(
            folder, tmp_path, calibration_tokens(checkpoint, "random", 1024), checkpoint
        )
        layer = passes.prepare(0)
        layer.experts[0] = ExpertInputs(
            torch.empty(0, dtype=torch.int64), torch.empty(0, 96, dtype=torch.bfloat16)
        )
        gate_up, count = layer.gate_up_statistics(0)
        down, correction = layer.down_statistics(
            0, lambda begin, end: torch.ones(end - begin, 64), lambda *_: torch.ones(0)
        )
        assert (count, gate_up is layer.gate_up, down is layer.down, correction) == (
            0,
            True,
            True,
            None,
        )
