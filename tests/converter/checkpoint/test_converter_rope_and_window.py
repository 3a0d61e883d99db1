"""Positions and attention masks are those of transformers for every setting in config.json."""

from pathlib import Path

import pytest
import torch
from changed_configs import CONFIGS, with_config
from make_checkpoint import SHAPES, make_checkpoint
from streamed_answers import some_windows, streamed, transformers_answer

from converter.calibration.calibration_pass import CalibrationPass
from converter.calibration.calibration_text import CalibrationTokens
from converter.checkpoint.source import Checkpoint


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "mini"
    make_checkpoint(folder, SHAPES["mini"], 2, dtype="F32", layout="fused")
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_streamed_predictions_follow_the_config_as_transformers_does(
    weights: Path, tmp_path: Path, name: str
) -> None:
    folder = with_config(weights, tmp_path / "model", CONFIGS[name])
    windows = some_windows(3, 48)
    logits, chosen = streamed(folder, windows)
    expected, expected_chosen = transformers_answer(folder, windows)
    assert (logits - expected).abs().max() < 1e-4 * expected.std()
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(chosen, expected_chosen, strict=True)
    )


@pytest.mark.parametrize("tied", [False, True])
def test_heads_wider_than_hidden_over_heads_and_a_tied_head(tmp_path: Path, tied: bool) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=24,
        num_local_experts=4,
        tie_word_embeddings=tied,
        pad_token_id=None,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    windows = some_windows(2, 24)
    logits, _ = streamed(tmp_path, windows)
    expected, _ = transformers_answer(tmp_path, windows)
    assert (logits - expected).abs().max() < 1e-4 * expected.std()


def test_calibration_statistics_are_those_of_a_model_with_a_window(
    weights: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = with_config(weights, tmp_path / "model", CONFIGS["window"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(
        lambda _, x: seen.append(x[0].flatten(0, -2))
    )
    tokens = CalibrationTokens("random", some_windows(4, 48), torch.ones(4))
    with torch.no_grad(), Checkpoint(folder) as checkpoint:
        model(input_ids=tokens.windows, use_cache=False)
        passes = CalibrationPass(
            checkpoint, tokens, tmp_path / "out", "test", lambda tasks: [task() for task in tasks]
        )
        found = passes.prepare(1).linears["model.layers.1.self_attn.o_proj"].hessian[0]
    torch.testing.assert_close(found, seen[0].T @ seen[0] / len(seen[0]))
