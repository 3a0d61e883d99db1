"""The model types that this release converts and loads, each tested: their fields in config.json,
and what these say.

A model of another type is refused by its name. What is inside a model transformers says
(converter/checkpoint).
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

MOST_TOKENS = 1 << 24
UNSET = object()
_SIZE = Integer(1, 1 << 20)
_COUNT = Integer(1, 1000)
_TOKEN = optional(Integer(-1, MOST_TOKENS))


@dataclass(frozen=True)
class Field:
    """The rule for a field, and what stands for it where config.json has none: transformers'
    default, or nothing.
    """

    rule: Rule
    default: Any = UNSET


@dataclass(frozen=True)
class ModelType:
    """The fields of one model type, and which of them say what every type has."""

    causal_class: str
    """transformers' class of it, as config.json names it in `architectures`."""
    experts: str
    """The field with the number of experts of a layer."""
    experts_alias: str
    """Another name of that field, which transformers prefers."""
    expert_width: str
    """The field with the intermediate size of an expert."""
    rope_theta: float
    """transformers' default."""
    whole_heads: bool
    """True if the heads together must be as wide as the hidden state."""
    own: dict[str, Field]
    """Fields that not every type has."""
    defaults: dict[str, Any]
    """transformers' defaults of fields that every type has, where types differ."""

    @property
    def fields(self) -> dict[str, Field]:
        """Every field that may reach transformers, beside rope_parameters
        (formats/config/rope_parameters.py).
        """
        common = {
            name: Field(rule, self.defaults.get(name, default))
            for name, (rule, default) in _COMMON.items()
        }
        classes = Field(optional(OneOf(([self.causal_class],))), [self.causal_class])
        return common | {"architectures": classes} | self.own

    @property
    def sizes(self) -> tuple[str, ...]:
        """The fields that the shapes of the model's tensors follow from."""
        return tuple(dict.fromkeys((*_SIZES, self.experts, self.expert_width)))


_COMMON: dict[str, tuple[Rule, Any]] = {
    "transformers_version": (optional(Text()), UNSET),
    "dtype": (optional(OneOf(("bfloat16", "float16", "float32"))), UNSET),
    "vocab_size": (Integer(1, MOST_TOKENS), UNSET),
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
    "eos_token_id": (Either(_TOKEN, ListOf(Integer(0, MOST_TOKENS), 64)), None),
    "tie_word_embeddings": (optional(Flag()), False),
    "attention_dropout": (Number(0, 1), 0.0),
    "num_experts_per_tok": (_COUNT, 8),
    "output_router_logits": (Flag(), False),
    "router_aux_loss_coef": (Number(0, 1e3), 0.001),
}
"""Field that every type has -> (rule, transformers' default where most types share one)."""

_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_experts_per_tok", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings",
)  # fmt: skip

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
        own={
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
        own={
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
        own={
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
