"""The bed of the GGUF comparison: its padded model computes the same function, and llama.cpp's
summary is read right.
"""

import json
from pathlib import Path

import pytest
import torch
from llama_programs import parse_divergence
from pad_checkpoint import Widths, logit_difference, pad_checkpoint
from safetensors.torch import load_file

SUMMARY = """\
====== Perplexity statistics ======
Mean PPL(Q)                   :  62.871200 ±   0.912300
Mean PPL(base)                :  61.500000 ±   0.900000
Mean ln(PPL(Q)/PPL(base))     :   0.022050 ±   0.001100
Mean PPL(Q)/PPL(base)         :   1.022295 ±   0.001124

====== KL divergence statistics ======
Mean    KLD:   0.012345 ±   0.000123
Maximum KLD:   1.500000

Same top p: 91.250 ± 0.120 %
"""


def test_padded_model_computes_the_same(example_folder: Path, tmp_path: Path) -> None:
    pad_checkpoint(example_folder, tmp_path / "padded")
    assert logit_difference(example_folder, tmp_path / "padded", tokens=64) < 1e-4


def test_padded_widths_are_whole_superblocks(example_folder: Path, tmp_path: Path) -> None:
    pad_checkpoint(example_folder, tmp_path / "padded")
    config = json.loads((tmp_path / "padded" / "config.json").read_text())
    assert (config["hidden_size"], config["intermediate_size"]) == (256, 512)
    for file in (tmp_path / "padded").glob("*.safetensors"):
        for name, weight in load_file(file).items():
            assert weight.shape[-1] % 256 == 0, name
            assert weight.dim() == 1 or weight.dtype == torch.bfloat16, name


def test_heads_that_do_not_fill_the_padded_width_are_refused() -> None:
    with pytest.raises(ValueError, match="256 is no multiple of 3 key-value heads of 32 channels"):
        Widths(hidden=192, intermediate=384, heads=6, kv_heads=3).padded()


def test_summary_of_llama_perplexity_is_read() -> None:
    quality = parse_divergence(SUMMARY)
    assert (quality.perplexity, quality.perplexity_error) == (62.8712, 0.9123)
    assert (quality.ratio, quality.ratio_error) == (1.022295, 0.001124)
    assert (quality.kl, quality.kl_error) == (0.012345, 0.000123)
    assert quality.same_top == pytest.approx(0.9125)


def test_output_without_a_summary_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no line Mean PPL"):
        parse_divergence("chunk 1")
