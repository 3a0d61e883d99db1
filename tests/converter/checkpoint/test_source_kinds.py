"""Kinds of source folders: at 16 bits the logits are those of plain transformers, or an error names
the next step.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from loaded_models import apart, load, logits
from safetensors.torch import load_file
from source_folders import (
    EMBEDDING,
    HEAD,
    INDEX,
    SINGLE,
    W1,
    adapter_tensors,
    beside,
    compiled_layer_by_layer,
    dangling_link,
    edit_json,
    extra_experts,
    extra_layer,
    float16,
    float32_under_a_config_of_bfloat16,
    fused,
    head_under_the_model_prefix,
    index_that_misplaces_tensors,
    inv_freq_in_each_layer,
    inv_freq_of_the_model,
    lfs_pointer,
    links,
    make_single,
    missing_layer,
    missing_shard,
    mlx_quantized,
    no_config,
    one_folder_too_high,
    only,
    other_vocabulary,
    other_weights,
    overlay,
    overlay_without_a_say,
    plain,
    prefixed,
    router_of_the_fused_layout,
    second_index,
    sharded,
    shards_that_the_index_does_not_name,
    single_beside_an_older_index,
    switch_mlp,
    tied_with_a_head_of_its_own,
    tied_with_a_head_of_its_own_in_float32,
    tied_with_an_equal_head,
    tied_with_the_head_alone,
    tied_without_a_head,
    untied_with_an_equal_head,
    untied_without_a_head,
    without_the_model_prefix,
)
from transformers import MixtralForCausalLM

from converter.checkpoint.shards.hub_model import HubModel
from converter.checkpoint.source import Checkpoint
from converter.convert import convert_checkpoint
from converter.recipe.recipes import make_recipe
from formats.errors import MoeConvertError

IDS = torch.randint(3, 4000, (1, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint to be changed."""
    return make_single(tmp_path / "source")


@pytest.mark.parametrize(
    "make",
    [
        plain,
        sharded,
        fused,
        float16,
        float32_under_a_config_of_bfloat16,
        index_that_misplaces_tensors,
        single_beside_an_older_index,
        shards_that_the_index_does_not_name,
        second_index,
        overlay,
        links,
        tied_with_an_equal_head,
        tied_without_a_head,
        tied_with_a_head_of_its_own,
        tied_with_a_head_of_its_own_in_float32,
        tied_with_the_head_alone,
        untied_with_an_equal_head,
        inv_freq_in_each_layer,
        inv_freq_of_the_model,
        without_the_model_prefix,
        head_under_the_model_prefix,
        router_of_the_fused_layout,
    ],
)
def test_what_transformers_reads_has_its_logits(
    make: Callable[[Path], None], source: Path, tmp_path: Path
) -> None:
    make(source)
    expected = logits(MixtralForCausalLM.from_pretrained(source, dtype=torch.float32).eval(), IDS)
    convert_checkpoint(source, tmp_path / "out", make_recipe("16bit"))
    assert apart(logits(load(tmp_path / "out"), IDS), expected) < 1e-5


@pytest.fixture(scope="module")
def expected_of_base(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """transformers' logits of the checkpoint before it is changed."""
    base = make_single(tmp_path_factory.mktemp("base") / "mini")
    return logits(MixtralForCausalLM.from_pretrained(base, dtype=torch.float32).eval(), IDS)


@pytest.mark.parametrize(
    "make",
    [
        prefixed("_orig_mod."),
        prefixed("module."),
        prefixed("base_model.model."),
        prefixed("module._orig_mod."),
        compiled_layer_by_layer,
        switch_mlp,
    ],
    ids=[
        "_orig_mod",
        "module",
        "base_model",
        "module._orig_mod",
        "compiled_layer_by_layer",
        "switch_mlp",
    ],
)
def test_other_programs_names_give_the_logits_of_transformers_names(
    make: Callable[[Path], None], source: Path, tmp_path: Path, expected_of_base: torch.Tensor
) -> None:
    make(source)
    convert_checkpoint(source, tmp_path / "out", make_recipe("16bit"))
    assert apart(logits(load(tmp_path / "out"), IDS), expected_of_base) < 1e-5


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (prefixed("module."), ["tensors are read under other names", "module.", " as "]),
        (tied_with_a_head_of_its_own, ["tie_word_embeddings", HEAD, EMBEDDING, "not tied"]),
        (tied_with_the_head_alone, [HEAD, EMBEDDING, "tied"]),
        (overlay, [W1, "model-overlay-00001.safetensors"]),
        (single_beside_an_older_index, [SINGLE, INDEX, "not read"]),
        (shards_that_the_index_does_not_name, ["model-00003-of-00003.safetensors", "not read"]),
        (second_index, ["model.fp16.safetensors.index.json", "not read"]),
    ],
    ids=[
        "prefix",
        "own_head",
        "head_alone",
        "overlay",
        "single_and_index",
        "unnamed_shard",
        "second_index",
    ],
)
def test_each_choice_is_logged_once(
    make: Callable[[Path], None], words: list[str], source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(source)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            Checkpoint(source).close()
    (message,) = [record.getMessage() for record in caplog.records]
    for word in words:
        assert word in message


def test_own_head_makes_config_and_index_say_not_tied(source: Path, tmp_path: Path) -> None:
    tied_with_a_head_of_its_own(source)
    convert_checkpoint(source, tmp_path / "out", make_recipe("16bit"))
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    assert (
        json.loads((tmp_path / "out/moe_index.json").read_text())["config"]["tie_word_embeddings"]
        is False
    )


def test_equal_head_is_stored_once(source: Path, tmp_path: Path) -> None:
    tied_with_an_equal_head(source)
    convert_checkpoint(source, tmp_path / "out", make_recipe("16bit"))
    assert HEAD not in load_file(tmp_path / "out/trunk.safetensors")


def test_complete_conversion_is_not_taken_for_one_of_another_overlay(
    source: Path, tmp_path: Path
) -> None:
    overlay(source)
    convert_checkpoint(source, tmp_path / "out", make_recipe("16bit"))
    weight_map = json.loads((source / INDEX).read_text())["weight_map"]
    edit_json(
        source / INDEX,
        weight_map=weight_map
        | {W1: "model-00001-of-00001.safetensors", EMBEDDING: "model-overlay-00001.safetensors"},
    )
    with pytest.raises(MoeConvertError, match="another choice of shards"):
        convert_checkpoint(source, tmp_path / "out", make_recipe("16bit"))


def test_own_head_of_a_repository_is_kept(source: Path, hub: HubServer) -> None:
    tied_with_a_head_of_its_own(source)
    hub.add("me/mini", source)
    with Checkpoint(HubModel.open("me/mini")) as checkpoint:
        assert HEAD in checkpoint.trunk
        assert not checkpoint.architecture.tie_word_embeddings


@pytest.mark.parametrize(
    ("make", "words", "hint"),
    [
        (
            other_weights,
            ["config.json", "transformers_weights", "ema.safetensors", SINGLE],
            "remove the field",
        ),
        (
            extra_layer,
            ["num_hidden_layers", "config.json is 1", "of 2", SINGLE],
            "set num_hidden_layers to 2",
        ),
        (
            missing_layer,
            ["num_hidden_layers", "config.json is 3", "layer 1"],
            "set num_hidden_layers to 2",
        ),
        (
            extra_experts,
            ["num_local_experts", "config.json is 3", "of 4", SINGLE],
            "set num_local_experts to 4",
        ),
        (
            other_vocabulary,
            [SINGLE, EMBEDDING, "[4096, 64]", "[4097, 64]", "vocab_size"],
            "correct the field",
        ),
        (untied_without_a_head, [HEAD, "tie_word_embeddings"], '"tie_word_embeddings": true'),
        (
            overlay_without_a_say,
            [W1, "model-overlay-00001.safetensors", "model-00001-of"],
            "name the right shard",
        ),
        (missing_shard, ["model-00002-of-00002.safetensors", "missing"], "get the shard again"),
        (dangling_link, [SINGLE, "missing", "/gone/blob"], "get the shard again"),
        (adapter_tensors, ["lora_A", "do not belong"], "merge_and_unload"),
        (mlx_quantized, ["switch_mlp", "U32"], "original checkpoint"),
        (beside("adapter_config.json"), ["adapter"], "moe-convert convert BASE --adapter"),
        (beside("moe_index.json"), ["converted already"], "moe-convert inspect"),
        (
            beside(".moe-convert.journal"),
            ["unfinished conversion"],
            "moe-convert convert CHECKPOINT -o",
        ),
        (only("model.gguf"), ["GGUF", "model.gguf"], "safetensors checkpoint"),
        (only("consolidated.00.pth", "params.json"), ["Mistral's own layout"], "hf download"),
        (only("consolidated.safetensors", "params.json"), ["Mistral's own layout"], "hf download"),
        (only("pytorch_model.bin"), ["pickled"], "safetensors version"),
        (only(), [SINGLE, INDEX], "name the folder"),
        (no_config, ["config.json is missing"], "name the folder"),
        (one_folder_too_high, ["config.json is missing"], "checkpoint-500"),
        (lfs_pointer(SINGLE), [SINGLE, "git-lfs pointer"], " lfs pull"),
        (lfs_pointer("config.json"), ["config.json", "git-lfs pointer"], " lfs pull"),
    ],
    ids=lambda value: getattr(value, "__name__", "") if callable(value) else "",
)
def test_what_is_not_read_is_refused_with_a_fitting_hint(
    make: Callable[[Path], None], words: list[str], hint: str, source: Path
) -> None:
    make(source)
    with pytest.raises(MoeConvertError) as caught:
        Checkpoint(source)
    for word in words:
        assert word in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("make", "words", "hint"),
    [
        (
            beside("adapter_config.json"),
            ["me/mini@", "adapter"],
            "moe-convert convert BASE --adapter me/mini",
        ),
        (
            beside("moe_index.json"),
            ["me/mini@", "converted already"],
            "moe-convert inspect me/mini shows",
        ),
        (only("model.Q4_K_M.gguf"), ["me/mini@", "GGUF"], "safetensors checkpoint"),
        (only("consolidated.00.pth"), ["me/mini@", "Mistral's own layout"], "hf download"),
        (only("pytorch_model.bin"), ["me/mini@", "pickled"], "safetensors version"),
    ],
    ids=["adapter", "converted", "gguf", "consolidated", "pickles"],
)
def test_repository_that_is_not_read_is_refused_with_a_fitting_hint(
    make: Callable[[Path], None], words: list[str], hint: str, source: Path, hub: HubServer
) -> None:
    make(source)
    hub.add("me/mini", source)
    with pytest.raises(MoeConvertError) as caught:
        HubModel.open("me/mini")
    for word in words:
        assert word in caught.value.message
    assert hint in caught.value.hint
