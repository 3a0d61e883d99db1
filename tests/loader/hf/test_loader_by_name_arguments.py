"""transformers' arguments for a converted model: their meaning, and errors that name them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from formats.errors import MoeConvertError, RecipeError
from loader.hf.by_name.device_map import device_of_map


@pytest.fixture(scope="module")
def folder(converted: Callable[[str], Path]) -> Path:
    return converted("2bit")


@pytest.mark.parametrize(
    ("device_map", "device"),
    [
        ("auto", "auto"),
        ("cpu", "cpu"),
        ("cuda", "cuda"),
        ("cuda:1", "cuda:1"),
        (0, "cuda:0"),
        (torch.device("cpu"), "cpu"),
        ({"": 0}, "cuda:0"),
        ({"": "cpu"}, "cpu"),
        ({"": torch.device("cuda", 1)}, "cuda:1"),
        ({"model": "cuda:0", "lm_head": 0}, "cuda:0"),
    ],
)
def test_a_device_map_is_a_device(device_map: Any, device: str) -> None:
    assert device_of_map(device_map) == device


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_a_model_with_a_device_map_says_where_it_is(folder: Path, device_map: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    assert model.hf_device_map == {"": model.device}
    assert model.device.type == "cpu" or device_map == "auto"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device_map", ["cuda", 0, {"": 0}])
def test_a_missing_gpu_is_not_replaced_by_the_cpu(folder: Path, device_map: Any) -> None:
    with pytest.raises(MoeConvertError, match="cuda"):
        AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)


@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [
        ({}, torch.bfloat16),
        ({"dtype": "auto"}, torch.bfloat16),
        ({"dtype": torch.float16}, torch.float16),
        ({"dtype": "float32"}, torch.float32),
        ({"torch_dtype": torch.float32}, torch.float32),
    ],
    ids=str,
)
def test_dtype_is_that_of_the_trunk(
    folder: Path, arguments: dict[str, Any], dtype: torch.dtype
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, **arguments)
    assert model.dtype == model.config.dtype == model.model.norm.weight.dtype == dtype


def test_fields_that_are_read_at_each_call_may_be_given(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        folder, use_cache=False, pad_token_id=5, attn_implementation="eager"
    )
    assert not model.config.use_cache
    assert model.config.pad_token_id == 5
    assert model.config._attn_implementation == "eager"
    config = AutoConfig.from_pretrained(folder)
    config.output_hidden_states = True
    model = AutoModelForCausalLM.from_pretrained(folder, config=config)
    assert len(model(torch.tensor([[1, 17]])).hidden_states) == config.num_hidden_layers + 1


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"device_map": "balanced"}, "device_map: 'balanced' splits"),
    ({"device_map": "sequential"}, "device_map: 'sequential' splits"),
    (
        {"device_map": {"model": "cpu", "lm_head": 0}},
        "device_map: the layers are split over cpu, cuda:0",
    ),
    ({"device_map": {"": "disk"}}, "device_map: 'disk' splits"),
    ({"device_map": {}}, "device_map: the map is empty"),
    ({"device_map": "mps"}, "device_map: 'mps'"),
    ({"device_map": -1}, "device_map: '-1'"),
    ({"device_map": True}, "device_map: 'True'"),
    ({"device_map": "no device"}, "device_map: 'no device'"),
    ({"device_map": "cpu", "device": "cpu"}, "device, device_map"),
    ({"max_memory": {0: "1GB"}}, r"max_memory(.|\n)*gpu_cache"),
    ({"dtype": "int8"}, "dtype: 'int8'"),
    (
        {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
        "quantization_config: 'bitsandbytes'",
    ),
    ({"load_in_4bit": True}, "load_in_4bit: unknown argument"),
    ({"num_experts_per_tok": 3}, r"num_experts_per_tok: 3(.|\n)*edit it"),
    ({"hidden_size": 64}, "hidden_size: 64"),
    ({"tp_plan": "auto"}, "tp_plan"),
    ({"output_loading_info": True}, "output_loading_info"),
    ({"experts_implementation": "eager"}, "experts_implementation: 'eager'"),
    ({"use_safetensors": False}, "use_safetensors"),
    ({"cache_dir": "elsewhere"}, r"cache_dir(.|\n)*HF_HUB_CACHE"),
    ({"attn_implementation": "owner/kernel"}, "attn_implementation: 'owner/kernel'"),
    ({"ram_cache": "many"}, "ram_cache: 'many'"),
    ({"policy": "random"}, "policy: 'random'"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=lambda v: str(v)[:40])
def test_an_argument_that_is_not_supported_is_named(
    folder: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        AutoModelForCausalLM.from_pretrained(folder, **arguments)


def test_arguments_by_position_are_refused(folder: Path) -> None:
    with pytest.raises(RecipeError, match="no positional arguments"):
        AutoModelForCausalLM.from_pretrained(folder, "cpu")
