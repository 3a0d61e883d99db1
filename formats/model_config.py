"""The gate for config.json: the fields that may reach transformers, each with its bounds and its default there.

A config.json comes from a stranger. transformers takes fields from it that select code (attention and expert kernels,
remote classes, quantizers) or files, and fails late, far from the cause, on numbers out of range. So it gets nothing
but what `gate_config` returns (docs/security.md).
"""

from dataclasses import dataclass
from typing import Any, NoReturn

from formats.errors import MoeConvertError
from formats.field_rules import (
    Either,
    Flag,
    Integer,
    ListOf,
    Number,
    OneOf,
    Refuse,
    Rule,
    Text,
    optional,
    short,
    take_field,
)
from formats.rope_parameters import SOURCES, merge_rope

MOST_TOKENS = 1 << 24
_SIZE = Integer(1, 1 << 20)
_COUNT = Integer(1, 1000)
_TOKEN = optional(Integer(-1, MOST_TOKENS))
_UNSET = object()


@dataclass(frozen=True)
class Field:
    """The rule for a field, and what stands for it where config.json has none: MixtralConfig's default, or nothing."""

    rule: Rule
    default: Any = _UNSET


FIELDS: dict[str, Field] = {
    "model_type": Field(OneOf(("mixtral",)), "mixtral"),
    "architectures": Field(optional(OneOf((["MixtralForCausalLM"],))), ["MixtralForCausalLM"]),
    "transformers_version": Field(optional(Text())),
    "dtype": Field(optional(OneOf(("bfloat16", "float16", "float32")))),
    "vocab_size": Field(Integer(1, MOST_TOKENS), 32000),
    "hidden_size": Field(_SIZE, 4096),
    "intermediate_size": Field(_SIZE, 14336),
    "num_hidden_layers": Field(_COUNT, 32),
    "num_attention_heads": Field(Integer(1, 1 << 16), 32),
    "num_key_value_heads": Field(optional(Integer(1, 1 << 16)), 8),
    "head_dim": Field(optional(Integer(2, 1 << 16)), None),
    "hidden_act": Field(OneOf(("silu", "swish")), "silu"),
    "max_position_embeddings": Field(Integer(2, 1 << 31), 131072),
    "initializer_range": Field(Number(0, 1e3), 0.02),
    "rms_norm_eps": Field(Number(0, 1), 1e-5),
    "use_cache": Field(Flag(), True),
    "pad_token_id": Field(_TOKEN, None),
    "bos_token_id": Field(_TOKEN, 1),
    "eos_token_id": Field(Either(_TOKEN, ListOf(Integer(0, MOST_TOKENS), 64)), 2),
    "tie_word_embeddings": Field(optional(Flag()), False),
    "sliding_window": Field(optional(Integer(1, 1 << 31)), None),
    "attention_dropout": Field(Number(0, 1), 0.0),
    "num_experts_per_tok": Field(_COUNT, 2),
    "num_local_experts": Field(_COUNT, 8),
    "output_router_logits": Field(Flag(), False),
    "router_aux_loss_coef": Field(Number(0, 1e3), 0.001),
    "router_jitter_noise": Field(Number(0, 0.999), 0.0),
}
"""What may reach transformers and is written to an output, beside rope_parameters (formats/rope_parameters.py)."""

RUN_TIME = (
    "transformers_version", "dtype", "max_position_embeddings", "rope_parameters", "initializer_range", "use_cache",
    "pad_token_id", "bos_token_id", "eos_token_id", "attention_dropout", "num_experts_per_tok", "output_router_logits",
    "router_aux_loss_coef", "router_jitter_noise",
)  # fmt: skip
"""Fields that a user may change in the config.json of a converted folder; the others belong to the weights."""

NOT_TAKEN = (
    "output_hidden_states", "return_dict", "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id",
    "problem_type",
)  # fmt: skip
"""Fields that MixtralConfig declares too, of no use to a causal language model; they change what its calls return."""

ALIASES = {"num_experts": "num_local_experts", "torch_dtype": "dtype"}
"""Other names by which transformers reads a field."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "is_causal": (None, True),
    "layer_types": (None, []),
    "per_layer_config": (None, {}),
    "attention_chunk_size": (None,),
    "kv_sharing_modes": (None, []),
    "compression_config": (None,),
}
"""Fields outside of FIELDS that change what transformers computes, and the values with which they change nothing."""

SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_local_experts", "num_experts_per_tok",
    "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings",
)  # fmt: skip
"""The numbers that an index records as `architecture`."""
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
MOST_EXPERTS = 100_000
"""Of all layers together: a file that claims more would cost memory and time before its tensors are looked at."""
_COMPUTED = ("head_dim", "num_key_value_heads", "tie_word_embeddings")


def gate_config(
    raw: Any, where: str, *, error: type[MoeConvertError], converted: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """(the fields that transformers may get, notes on what was left out or replaced) of a config.json's value.

    The result has every field that has a default, in bounds and with one name; it passes the gate unchanged.
    A field that is not in FIELDS is left out; of a converted folder (`converted`) it is refused, because the converter
    writes none. quantization_config is the caller's to check. Raises `error` naming `where`, field, value.
    """

    def refuse(field: str, message: str) -> NoReturn:
        again = "or get config.json again from where the folder was published" if converted else "and run again"
        raise error(f"{where}: {message}", f"correct {field} in config.json, {again}")

    if not isinstance(raw, dict):
        raise error(f"{where}: not an object", "get config.json again")
    notes: list[str] = []
    given = _renamed(raw, notes)
    elsewhere = {*FIELDS, *SOURCES, "quantization_config"}
    left_out = {name: value for name, value in given.items() if name not in elsewhere}
    for name, value in left_out.items():
        if converted:
            message = f"{where}: field {short(name)} is {short(value)}: it is not among those that transformers may get"
            raise error(message, f"remove {short(name)} from config.json; docs/security.md lists the fields")
        if value not in NEUTRAL.get(name, (value,)):
            refuse(name, f"{name} is {short(value)}, which is not read")
    fields = {n: take_field(n, value, FIELDS[n].rule, refuse) for n, value in given.items() if n in FIELDS}
    absent = [name for name in SIZES if name not in fields and name not in _COMPUTED]
    if converted and absent:
        raise error(f"{where}: field {absent[0]} is missing", "get config.json again from where it was published")
    if absent:
        notes.append("left to transformers' defaults: " + ", ".join(f"{n} ({FIELDS[n].default})" for n in absent))
    _fill_defaults(fields)
    _check_sizes(fields, refuse)
    _check_tokens(fields, notes, refuse)
    positions, head_dim = fields["max_position_embeddings"], fields["head_dim"]
    rope, unread = merge_rope(given, positions, head_dim, refuse)
    fields["rope_parameters"] = rope
    if left := {**left_out, **unread}:
        names = [f"{short(name)} ({short(value)})" for name, value in list(left.items())[:16]]
        names += [f"{len(left) - 16} more"] if len(left) > 16 else []
        notes.append(f"left out, transformers never gets them: {', '.join(names)}")
    return fields, notes


def check_token(name: str, value: Any, vocab_size: int, refuse: Refuse) -> Any:
    """A token id, or a list of them, of a vocabulary; -1 stands for none, as in many published files."""
    if value == -1:
        return None
    for token in value if isinstance(value, list) else [value]:
        if token is not None and not 0 <= token < vocab_size:
            refuse(name, f"{name} is {short(value)}, outside of the vocabulary of {vocab_size} tokens (vocab_size)")
    return value


def _renamed(raw: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """`raw` with one name for each field. As in transformers num_experts goes before, and torch_dtype after."""
    given = {name: value for name, value in raw.items() if name not in ALIASES}
    for alias, name in ALIASES.items():
        if alias not in raw:
            continue
        order = (alias, name) if alias == "num_experts" else (name, alias)
        found = [(key, raw[key]) for key in order if raw.get(key) is not None]
        given[name] = found[0][1] if found else None
        if len(found) == 2 and found[0][1] != found[1][1]:
            notes.append(" goes before ".join(f"{key} ({short(value)})" for key, value in found))
    return given


def _fill_defaults(fields: dict[str, Any]) -> None:
    """Writes each default of transformers where there is no value, and the numbers that it computes from others."""
    for name, field in FIELDS.items():
        if field.default is not _UNSET and name not in _TOKENS:
            fields.setdefault(name, field.default)
    if fields["architectures"] is None:
        fields["architectures"] = FIELDS["architectures"].default
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    if fields["head_dim"] is None:
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    if fields["tie_word_embeddings"] is None:
        fields["tie_word_embeddings"] = False
    if fields["hidden_act"] == "swish":
        fields["hidden_act"] = "silu"


def _check_sizes(fields: dict[str, Any], refuse: Refuse) -> None:
    for part, whole in (("num_experts_per_tok", "num_local_experts"), ("num_key_value_heads", "num_attention_heads")):
        if fields[part] > fields[whole]:
            refuse(part, f"{part} is {fields[part]}, more than {whole}, which is {fields[whole]}")
    layers, experts = fields["num_hidden_layers"], fields["num_local_experts"]
    if layers * experts > MOST_EXPERTS:
        refuse(
            "num_local_experts",
            f"num_hidden_layers is {layers} and num_local_experts {experts}: over {MOST_EXPERTS} experts together",
        )
    heads, key_value_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    if heads % key_value_heads:
        message = f"num_attention_heads is {heads}, no multiple of num_key_value_heads, which is {key_value_heads}"
        refuse("num_key_value_heads", message)
    if fields["head_dim"] < 2 or fields["head_dim"] % 2:
        refuse("head_dim", f"head_dim is {fields['head_dim']}, expected is an even number of at least 2")


def _check_tokens(fields: dict[str, Any], notes: list[str], refuse: Refuse) -> None:
    for name in _TOKENS:
        value = fields.get(name, FIELDS[name].default)
        if name not in fields and value is not None and value >= fields["vocab_size"]:
            value = None
        fields[name] = check_token(name, value, fields["vocab_size"], refuse)
        if value != fields[name]:
            notes.append(f"{name} {value} is taken as none")
