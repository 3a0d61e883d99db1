"""transformers' private names that the loader uses: releases that have them, and the effect of a
missing name.
"""

import ast
import logging

import pytest
import torch
import transformers
from project_paths import ROOT
from torch import nn
from transformers import (
    DynamicCache,
    GenerationMixin,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils import output_capturing
from transformers.utils.quantization_config import QuantizationConfigMixin

from loader.hf import private_names

SMALL = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 2,
}


@pytest.fixture(autouse=True)
def _looked_up_anew():
    yield
    private_names.active_collector.cache_clear()
    private_names.generation_methods.cache_clear()


def other_parameters(self, input_ids, past=None):
    """prepare_inputs_for_generation with parameters of no release."""


@pytest.mark.parametrize(
    ("owner", "name", "value", "look_up", "consequence"),
    [
        (
            output_capturing,
            "_active_collector",
            None,
            private_names.active_collector,
            "after a call that records outputs",
        ),
        (
            GenerationMixin,
            private_names.UPDATE_METHOD,
            None,
            private_names.generation_methods,
            "copies",
        ),
        (
            GenerationMixin,
            "prepare_inputs_for_generation",
            other_parameters,
            private_names.generation_methods,
            "copies",
        ),
    ],
)
def test_a_missing_name_is_logged_once(
    monkeypatch, caplog, owner, name, value, look_up, consequence
):
    monkeypatch.delattr(owner, name)
    if value is not None:
        monkeypatch.setattr(owner, name, value, raising=False)
    look_up.cache_clear()
    with caplog.at_level(logging.INFO, logger="loader"):
        assert look_up() is None
        assert look_up() is None
    assert len(caplog.messages) == 1
    assert consequence in caplog.messages[0]


def private_names_of_transformers():
    """Names with one leading underscore that this release's classes define."""
    owners = (PreTrainedModel, GenerationMixin, HfQuantizer, DynamicCache, MixtralConfig())
    found = {name for owner in owners for name in dir(owner)} - set(dir(nn.Module))
    known = {
        "_active_collector",
        "_commit_hash",
        "_is_hf_initialized",
        *private_names.INTERNAL_ARGUMENTS,
    }
    return known | {name for name in found if name.startswith("_") and not name.startswith("__")}


def mentioned(path):
    """Identifiers and strings in a source file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.alias):
            yield node.name
        elif isinstance(node, ast.Constant):
            yield node.value


def test_private_names_are_used_in_one_file():
    private = private_names_of_transformers()
    uses = {
        str(path.relative_to(ROOT)): private.intersection(mentioned(path))
        for path in (ROOT / "loader").rglob("*.py")
    }
    assert uses.pop("loader/hf/private_names.py") > {"_supports_sdpa", "_is_hf_initialized"}
    assert {path: names for path, names in uses.items() if names} == {}


NEEDED = {
    f"HfQuantizer.{private_names.BEFORE_WEIGHTS_METHOD}": (
        HfQuantizer,
        "loader/hf/loading/plugin.py replaces modules there",
    ),
    "PreTrainedModel._keys_to_ignore_on_load_unexpected": (
        PreTrainedModel,
        "loader/hf/loading/plugin.py names fillers",
    ),
    f"GenerationMixin.{private_names.UPDATE_METHOD}": (
        GenerationMixin,
        "loader/hf/model_class.py overrides it",
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


@pytest.mark.parametrize("wanted", [True, False])
def test_this_release_keeps_the_wish_for_attention_weights_where_the_loader_looks(wanted):
    config = MixtralConfig(attn_implementation="eager")
    config.output_attentions = wanted
    found = private_names.returns_attentions(config) or vars(config).get("output_attentions")
    assert bool(found) == wanted


def test_a_configuration_with_a_commit_says_which():
    config = MixtralConfig()
    assert private_names.commit_hash(config) is None
    setattr(config, private_names.COMMIT_HASH, "0123abc")
    assert private_names.commit_hash(config) == "0123abc"


def test_mixtral_supports_sdpa_in_this_release():
    assert private_names.supports_sdpa(MixtralForCausalLM)
    assert not private_names.supports_sdpa(PreTrainedModel)


def test_this_release_calls_a_quantizer_before_the_weights_are_loaded():
    seen = []

    @private_names.replaces_modules
    class Replacing(HfQuantizer):
        def is_serializable(self, *args, **kwargs):
            return False

        @property
        def is_trainable(self):
            return False

        def replace_modules(self, model):
            seen.append(model)

    config = MixtralConfig(**SMALL)
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    Replacing(QuantizationConfigMixin("test")).preprocess_model(model)
    assert seen == [model]


def test_this_release_skips_the_initialization_of_a_marked_module():
    model = MixtralForCausalLM(MixtralConfig(**SMALL))
    kept, other = model.lm_head, model.model.layers[0].self_attn.q_proj
    for module in (*model.modules(), model):
        module._is_hf_initialized = False
    with torch.no_grad():
        kept.weight.fill_(7)
        other.weight.fill_(7)
    private_names.skip_initialization(kept)
    model.initialize_weights()
    assert (kept.weight == 7).all()
    assert not (other.weight == 7).any()


def test_this_release_ignores_tensors_of_the_pattern(tmp_path, caplog):
    plain = MixtralForCausalLM(MixtralConfig(**SMALL))
    plain.save_pretrained(tmp_path, state_dict={**plain.state_dict(), "__pad__.1": torch.zeros(3)})

    class Ignoring(MixtralForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            private_names.ignore_unexpected(self, r"^__pad__\.")

    for model_class, unexpected in ((MixtralForCausalLM, {"__pad__.1"}), (Ignoring, set())):
        _, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert set(info["unexpected_keys"]) == unexpected


def test_this_release_puts_its_recording_hooks_where_the_loader_looks():
    hooks = [
        getattr(output_capturing, name)
        for name in dir(output_capturing)
        if name.startswith("install_")
    ]
    assert {hook.__module__ for hook in hooks} == {private_names.RECORDER_MODULE}
