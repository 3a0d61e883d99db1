"""The model types that this release converts and loads: their fields in config.json.

Each is tested; any other type is refused by name. The names and shapes of a model's tensors come
from transformers (converter/checkpoint).
"""

from dataclasses import dataclass
from typing import Any

from formats.config.field_rules import (
    Either,
    Flag,
    Integer,
    ListOf,
    Number,
    OneOf,
    Rule,
    Text,
    optional,
)

MAX_VOCABULARY = 1 << 24
"""Upper bound of vocab_size and of token ids."""
UNSET = object()
"""No default: a config.json without the field stays without it."""
_SIZE = Integer(1, 1 << 20)
_COUNT = Integer(1, 1000)
_TOKEN = optional(Integer(-1, MAX_VOCABULARY))


@dataclass(frozen=True)
class Field:
    """The rule for a field, and transformers' default for a config.json without it."""

    rule: Rule
    default: Any = UNSET


@dataclass(frozen=True)
class ModelType:
    """The fields of one model type, and its names for fields that every type has."""

    causal_class: str
    """Class name in transformers, as in `architectures` of config.json."""
    experts: str
    """Field with the number of experts per layer."""
    experts_alias: str
    """Second name of the same field. In transformers it overrides the first."""
    expert_width: str
    """Field with the intermediate size of an expert."""
    rope_theta: float
    """Default of transformers."""
    whole_heads: bool
    """True if num_attention_heads · head_dim must equal hidden_size."""
    extra_fields: dict[str, Field]
    """Fields that other types lack."""
    defaults: dict[str, Any]
    """Defaults of transformers that differ from those in `_COMMON`."""

    @property
    def fields(self) -> dict[str, Field]:
        """All fields that may reach transformers, except rope_parameters (`rope_parameters.py`)."""
        common = {
            name: Field(rule, self.defaults.get(name, default))
            for name, (rule, default) in _COMMON.items()
        }
        classes = Field(optional(OneOf(([self.causal_class],))), [self.causal_class])
        return common | {"architectures": classes} | self.extra_fields

    @property
    def sizes(self) -> tuple[str, ...]:
        """Fields with the model's sizes. The config.json of a converted folder must have them."""
        return tuple(dict.fromkeys((*_SIZES, self.experts, self.expert_width)))


_COMMON: dict[str, tuple[Rule, Any]] = {
    "transformers_version": (optional(Text()), UNSET),
    "dtype": (optional(OneOf(("bfloat16", "float16", "float32"))), UNSET),
    "vocab_size": (Integer(1, MAX_VOCABULARY), UNSET),
    "hidden_size": (_SIZE, UNSET),
    "intermediate_size": (_SIZE, UNSET),
    "num_hidden_layers": (_COUNT, UNSET),
    "num_attention_heads": (Integer(1, 1 << 16), UNSET),
    "num_key_value_heads": (optional(Integer(1, 1 << 16)), None),
    "head_dim": (optional(Integer(2, 1 << 16)), None),
    "hidden_act": (OneOf(("silu", "swish")), "silu"),
    "max_position_embeddings": (Integer(2, 1 << 31), UNSET),
    "initializer_range": (Number(0, 1e3), 0.02),
    "rms_norm_eps": (Number(0, 1), 1e-5),
    "use_cache": (Flag(), True),
    "pad_token_id": (_TOKEN, None),
    "bos_token_id": (_TOKEN, None),
    "eos_token_id": (Either(_TOKEN, ListOf(Integer(0, MAX_VOCABULARY), 64)), None),
    "tie_word_embeddings": (optional(Flag()), False),
    "attention_dropout": (Number(0, 1), 0.0),
    "num_experts_per_tok": (_COUNT, 8),
    "output_router_logits": (Flag(), False),
    "router_aux_loss_coef": (Number(0, 1e3), 0.001),
}
"""Field that every type has -> (rule, default of transformers where several types share it)."""

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_experts_per_tok",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
)

_WINDOW = optional(Integer(1, 1 << 31))
_LAYERS = Either(ListOf(Integer(0, 999), 1000), OneOf(([], None)))

MODEL_TYPES: dict[str, ModelType] = {
    "mixtral": ModelType(
        causal_class="MixtralForCausalLM",
        experts="num_local_experts",
        experts_alias="num_experts",
        expert_width="intermediate_size",
        rope_theta=1_000_000.0,
        whole_heads=False,
        extra_fields={
            "num_local_experts": Field(_COUNT, 8),
            "router_jitter_noise": Field(Number(0, 0.999), 0.0),
            "sliding_window": Field(_WINDOW, None),
        },
        defaults={
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen3_moe": ModelType(
        causal_class="Qwen3MoeForCausalLM",
        experts="num_experts",
        experts_alias="num_local_experts",
        expert_width="moe_intermediate_size",
        rope_theta=10_000.0,
        whole_heads=False,
        extra_fields={
            "num_experts": Field(_COUNT, 128),
            "moe_intermediate_size": Field(_SIZE, 768),
            "norm_topk_prob": Field(Flag(), False),
            "mlp_only_layers": Field(_LAYERS, []),
            "decoder_sparse_step": Field(_COUNT, 1),
            "attention_bias": Field(Flag(), False),
            "use_sliding_window": Field(Flag(), False),
            "sliding_window": Field(_WINDOW, 4096),
        },
        defaults={
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
        },
    ),
    "olmoe": ModelType(
        causal_class="OlmoeForCausalLM",
        experts="num_experts",
        experts_alias="num_local_experts",
        expert_width="intermediate_size",
        rope_theta=10_000.0,
        whole_heads=True,
        extra_fields={
            "num_experts": Field(_COUNT, 64),
            "norm_topk_prob": Field(Flag(), False),
            "attention_bias": Field(Flag(), False),
            "clip_qkv": Field(optional(Number(1e-6, 1e6)), None),
        },
        defaults={
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "max_position_embeddings": 4096,
            "pad_token_id": 1,
            "eos_token_id": 50279,
            "router_aux_loss_coef": 0.01,
        },
    ),
}
