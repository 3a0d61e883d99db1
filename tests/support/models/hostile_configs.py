"""Values that strangers' config.json and generation_config.json may hold, for tests of every way
into the product.
"""

from typing import Any

from formats.config.generation_config import GENERATION_FIELDS
from formats.config.model_types import MODEL_TYPES

FIELDS = ("model_type", *MODEL_TYPES["mixtral"].fields)

VALUES: list[Any] = [
    -1,
    0,
    1,
    2,
    3,
    4096,
    None,
    2**31,
    2**63,
    10**30,
    0.5,
    -0.5,
    1e308,
    True,
    False,
    "",
    "2",
    "nan",
    [],
    [1],
    ["a"],
    {},
    {"a": 1},
    [[2]],
]

KERNEL = "some-org/kernel@0123abc:fn"
CODE: dict[str, Any] = {
    "attn_implementation": KERNEL,
    "_attn_implementation": f"paged|{KERNEL}",
    "_attn_implementation_internal": "flash_attention_2",
    "attn_implementation_internal": KERNEL,
    "experts_implementation": KERNEL,
    "_experts_implementation": "deepgemm",
    "_experts_implementation_internal": KERNEL,
    "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    "allow_all_kernels": True,
    "use_kernels": True,
    "kernel_config": {"RMSNorm": KERNEL},
    "fusion_config": {"a": "b"},
    "distributed_config": {"tp_plan": "auto"},
    "base_model_tp_plan": {"layers.*": "colwise"},
    "trust_remote_code": True,
    "transformers_weights": "evil.safetensors",
    "name_or_path": "some-org/other",
    "_name_or_path": "some-org/other",
    "text_config": {"attn_implementation": KERNEL},
    "decoder": {"model_type": "llama"},
    "encoder": {"model_type": "t5"},
    "custom_generate": "some-org/generate",
    "custom_pipelines": {"a": {"impl": "evil.Pipeline"}},
    "torchscript": True,
    "gradient_checkpointing": True,
    "output_attentions": True,
    "__class__": "evil",
    "attribute_map": {"hidden_size": "evil"},
    "sub_configs": {"a": "b"},
    "rope_parameters_": {"rope_type": KERNEL},
    "\x1b[31m\u202e": "\x07",
}
"""Fields that select code or files in some version of transformers, and what looks like them."""

CONFIGS: dict[str, dict[str, Any]] = {
    **{f"{name} {value!r}"[:60]: {name: value} for name in FIELDS for value in VALUES},
    "heads that do not divide": {
        "num_attention_heads": 3,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
    "more key-value heads than heads": {"num_key_value_heads": 8},
    "an odd head_dim": {"head_dim": 15},
    "a head_dim of 1": {"num_attention_heads": 64, "num_key_value_heads": 2, "head_dim": None},
    "more experts a token than there are": {"num_experts_per_tok": 5},
    "a billion experts": {"num_hidden_layers": 1000, "num_local_experts": 1000},
    "a pad token behind the vocabulary": {"pad_token_id": 4096},
    "an end token behind the vocabulary": {"eos_token_id": [2, 4096]},
    "rope_theta of nothing": {"rope_theta": None},
    "rope_theta 0": {"rope_theta": 0},
    "rope_theta text": {"rope_theta": "1e6"},
    "rope_scaling text": {"rope_scaling": "yarn"},
    "rope_scaling list": {"rope_scaling": [1]},
    "rope_parameters number": {"rope_parameters": 1},
    "an unknown rope type": {"rope_scaling": {"rope_type": "su", "factor": 2.0}},
    "a rope type that is a list": {"rope_scaling": {"rope_type": ["yarn"], "factor": 2.0}},
    "a rope type of a method": {"rope_scaling": {"rope_type": "__class__", "factor": 2.0}},
    "linear without factor": {"rope_scaling": {"type": "linear"}},
    **{f"linear by {f!r}": {"rope_scaling": {"type": "linear", "factor": f}} for f in VALUES},
    **{f"dynamic by {f!r}": {"rope_scaling": {"type": "dynamic", "factor": f}} for f in VALUES},
    **{f"yarn by {f!r}": {"rope_scaling": {"type": "yarn", "factor": f}} for f in VALUES},
    **{
        f"yarn with {name} {value!r}": {
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, name: value}
        }
        for name in (
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "truncate",
        )
        for value in VALUES
    },
    "llama3 without frequencies": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    "llama3 with equal frequencies": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
        }
    },
    "longrope with too few factors": {
        "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}
    },
    "longrope with text": {
        "rope_scaling": {"rope_type": "longrope", "short_factor": "a" * 8, "long_factor": "b" * 8}
    },
    "partial rotation": {"partial_rotary_factor": 0.5},
    "partial rotation inside": {
        "rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}
    },
    "layer types": {"layer_types": ["sliding_attention"]},
    "other numbers by layer": {"per_layer_config": {"0": {"num_experts_per_tok": 1}}},
    "no causal mask": {"is_causal": False},
    "two counts of experts": {"num_experts": 8},
    "a dtype that torch has not": {"torch_dtype": "float99"},
    "a dtype that is a function": {"dtype": "load"},
    **{f"{name} and nothing else": {name: value} for name, value in CODE.items()},
}
"""Changes of a config.json that works: name -> fields."""

GENERATION_CONFIGS: dict[str, Any] = {
    **{f"{name} {value!r}"[:60]: {name: value} for name in GENERATION_FIELDS for value in VALUES},
    "a cache by name": {"cache_implementation": "evil"},
    "compilation": {"compile_config": {"backend": "evil"}},
    "a watermark": {"watermarking_config": {"a": 1}},
    "code of a repository": {"custom_generate": "some-org/generate"},
    "an assistant": {"assistant_model": "some-org/small", "prompt_lookup_num_tokens": 3},
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "beams in groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    "stop strings": {"stop_strings": ["a"]},
    "objects as results": {"return_dict_in_generate": True, "output_attentions": True},
    "several results": {"num_return_sequences": 4},
    "a processor": {"logits_processor": ["evil"]},
    "a list": [],
    "a number": 7,
    "nothing": None,
}
"""generation_config.json: name -> its value."""
