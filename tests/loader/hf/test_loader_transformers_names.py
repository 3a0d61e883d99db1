"""Names inside transformers that the loader needs: which release lacks one, and what is slower
there.
"""

import logging

import pytest
import transformers
from transformers import DynamicCache, MixtralConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.models.auto import modeling_auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils import output_capturing

from loader.hf import private_names


@pytest.fixture(autouse=True)
def _looked_up_anew():
    yield
    private_names.active_collector.cache_clear()
    private_names.generation_methods.cache_clear()


def other_arguments(self, input_ids, past=None):
    """prepare_inputs_for_generation as no release has it."""


@pytest.mark.parametrize(
    ("owner", "name", "value", "look_up", "loss"),
    [
        (
            output_capturing,
            "_active_collector",
            None,
            private_names.active_collector,
            "once outputs were recorded",
        ),
        (
            GenerationMixin,
            "_update_model_kwargs_for_generation",
            None,
            private_names.generation_methods,
            "copies",
        ),
        (
            GenerationMixin,
            "prepare_inputs_for_generation",
            other_arguments,
            private_names.generation_methods,
            "copies",
        ),
    ],
)
def test_another_name_is_logged_once(monkeypatch, caplog, owner, name, value, look_up, loss):
    monkeypatch.delattr(owner, name)
    if value is not None:
        monkeypatch.setattr(owner, name, value, raising=False)
    look_up.cache_clear()
    with caplog.at_level(logging.INFO, logger="loader"):
        assert look_up() is None
        assert look_up() is None
    assert [
        record.getMessage() for record in caplog.records if loss in record.getMessage()
    ] == caplog.messages
    assert len(caplog.messages) == 1


NEEDED = {
    "HfQuantizer._process_model_before_weight_loading": (
        HfQuantizer,
        "loader/hf/loading/plugin.py puts our modules in",
    ),
    "PreTrainedModel._keys_to_ignore_on_load_unexpected": (
        PreTrainedModel,
        "loader/hf/loading/plugin.py names fillers",
    ),
    "GenerationMixin._update_model_kwargs_for_generation": (
        GenerationMixin,
        "loader/hf/model_class.py has its own",
    ),
    "modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": (
        modeling_auto,
        "loader/hf/by_name/registration.py finds the classes",
    ),
    "modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES": (
        modeling_auto,
        "loader/hf/by_name/registration.py adds types",
    ),
    "modeling_auto.AutoModelForMultimodalLM": (
        modeling_auto,
        "loader/hf/by_name/registration.py registers there",
    ),
    "PreTrainedModel._supports_sdpa": (
        PreTrainedModel,
        "loader/hf/loading/configuration.py chooses the attention",
    ),
}


@pytest.mark.parametrize("name", NEEDED)
def test_this_release_has_the_name(name):
    owner, use = NEEDED[name]
    assert hasattr(owner, name.partition(".")[2]), (
        f"transformers {transformers.__version__} lacks {name}: {use}"
    )


@pytest.mark.parametrize("name", ["layers", "layer_class_to_replicate", "offloading"])
def test_a_kv_cache_of_this_release_has_the_attribute(name):
    assert hasattr(DynamicCache(), name), (
        f"transformers {transformers.__version__}: DynamicCache lacks {name}"
    )


def test_this_release_keeps_the_choice_of_experts_where_the_loader_looks():
    config = MixtralConfig()
    config._experts_implementation = "eager"
    assert private_names.experts_implementation(config) == "eager"


def test_this_release_says_which_attention_a_configuration_has():
    config = MixtralConfig()
    config._attn_implementation = "sdpa"
    assert private_names.attention_implementation(config) == config._attn_implementation == "sdpa"


def test_this_release_puts_its_recording_hooks_where_the_loader_looks():
    hooks = [
        getattr(output_capturing, name)
        for name in dir(output_capturing)
        if name.startswith("install_")
    ]
    assert {hook.__module__ for hook in hooks} == {private_names.RECORDER_MODULE}
