"""The gate for config.json: the fields that may reach transformers, each with its bounds and its
default there.

A config.json comes from a stranger. transformers takes fields from it that select code (attention
and expert kernels, remote classes, quantizers) or files, and fails late, far from the cause, on
numbers out of range. So it gets nothing but what `gate_config` returns (docs/security.md).
"""

from typing import Any, NoReturn

from formats.config.field_rules import Refuse, short, take_field
from formats.config.model_types import MODEL_TYPES, UNSET, ModelType
from formats.config.rope_parameters import SOURCES, merge_rope
from formats.errors import MoeConvertError

RUN_TIME = (
    "transformers_version", "dtype", "max_position_embeddings", "rope_parameters", "initializer_range", "use_cache",
    "pad_token_id", "bos_token_id", "eos_token_id", "attention_dropout", "num_experts_per_tok", "output_router_logits",
    "router_aux_loss_coef", "router_jitter_noise",
)  # fmt: skip
"""Fields that a user may change in the config.json of a converted folder; the others belong to the
weights.
"""

NOT_TAKEN = (
    "output_hidden_states", "return_dict", "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id",
    "problem_type",
)  # fmt: skip
"""Fields that transformers declares too, of no use to a causal language model; they change what its
calls return.
"""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "is_causal": (None, True),
    "layer_types": (None, []),
    "per_layer_config": (None, {}),
    "attention_chunk_size": (None,),
    "kv_sharing_modes": (None, []),
    "compression_config": (None,),
}
"""Fields of no model type that change what transformers computes, and the values with which they
change nothing.
"""

_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
MOST_EXPERTS = 100_000
"""Of all layers together: a file that claims more would cost memory and time before its tensors are
looked at.
"""
_COMPUTED = ("head_dim", "num_key_value_heads", "tie_word_embeddings")


def gate_config(
    raw: Any, where: str, *, error: type[MoeConvertError], converted: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """(the fields that transformers may get, notes on what was left out or replaced) of a
    config.json's value.

    The result has every field that has a default, in bounds and with one name; it passes the gate
    unchanged. A field that is not the model type's is left out; of a converted folder (`converted`)
    it is refused, because the converter writes none. quantization_config is the caller's to check.
    Raises `error` naming `where`, field, value.
    """

    def refuse(field: str, message: str) -> NoReturn:
        again = (
            "or get config.json again from where the folder was published"
            if converted
            else "and run again"
        )
        raise error(f"{where}: {message}", f"correct {field} in config.json, {again}")

    if not isinstance(raw, dict):
        raise error(f"{where}: not an object", "get config.json again")
    model_type = _model_type(raw.get("model_type"), refuse)
    known = model_type.fields
    notes: list[str] = []
    given = _renamed(raw, model_type, notes)
    elsewhere = {"model_type", *known, *SOURCES, "quantization_config"}
    left_out = {name: value for name, value in given.items() if name not in elsewhere}
    for name, value in left_out.items():
        if converted:
            message = f"{where}: field {short(name)} is {short(value)}: it is not among those that transformers may get"
            raise error(
                message, f"remove {short(name)} from config.json; docs/security.md lists the fields"
            )
        if value not in NEUTRAL.get(name, (value,)):
            refuse(name, f"{name} is {short(value)}, which is not read")
    fields = {
        name: take_field(name, value, known[name].rule, refuse) if name in known else value
        for name, value in given.items()
        if name in known or name == "model_type"
    }
    absent = [name for name in model_type.sizes if name not in fields and name not in _COMPUTED]
    if converted and absent:
        raise error(
            f"{where}: field {absent[0]} is missing",
            "get config.json again from where it was published",
        )
    if absent:
        notes.append(
            "left to transformers' defaults: "
            + ", ".join(f"{n} ({known[n].default})" for n in absent)
        )
    _fill_defaults(fields, model_type)
    _check_sizes(fields, model_type, refuse)
    _check_tokens(fields, model_type, notes, refuse)
    positions, head_dim = fields["max_position_embeddings"], fields["head_dim"]
    rope, unread = merge_rope(given, positions, head_dim, model_type.rope_theta, refuse)
    fields["rope_parameters"] = rope
    if left := {**left_out, **unread}:
        names = [f"{short(name)} ({short(value)})" for name, value in list(left.items())[:16]]
        names += [f"{len(left) - 16} more"] if len(left) > 16 else []
        notes.append(f"left out, transformers never gets them: {', '.join(names)}")
    return fields, notes


def check_token(name: str, value: Any, vocab_size: int, refuse: Refuse) -> Any:
    """A token id, or a list of them, of a vocabulary; -1 stands for none, as in many published
    files.
    """
    if value == -1:
        return None
    for token in value if isinstance(value, list) else [value]:
        if token is not None and not 0 <= token < vocab_size:
            refuse(
                name,
                f"{name} is {short(value)}, outside of the vocabulary of {vocab_size} tokens (vocab_size)",
            )
    return value


def _model_type(name: Any, refuse: Refuse) -> ModelType:
    if type(name) is not str or name not in MODEL_TYPES:
        refuse(
            "model_type",
            f"model_type is {short(name)}, converted and loaded are {', '.join(MODEL_TYPES)}",
        )
    return MODEL_TYPES[name]


def _renamed(raw: dict[str, Any], model_type: ModelType, notes: list[str]) -> dict[str, Any]:
    """`raw` with one name a field. As in transformers the alias of the experts goes before,
    torch_dtype after.
    """
    aliases = {model_type.experts_alias: model_type.experts, "torch_dtype": "dtype"}
    given = {name: value for name, value in raw.items() if name not in aliases}
    for alias, name in aliases.items():
        if alias not in raw:
            continue
        order = (name, alias) if alias == "torch_dtype" else (alias, name)
        found = [(key, raw[key]) for key in order if raw.get(key) is not None]
        given[name] = found[0][1] if found else None
        if len(found) == 2 and found[0][1] != found[1][1]:
            notes.append(" goes before ".join(f"{key} ({short(value)})" for key, value in found))
    return given


def _fill_defaults(fields: dict[str, Any], model_type: ModelType) -> None:
    """Writes each default of transformers where there is no value, and the numbers that it computes
    from others.
    """
    known = model_type.fields
    for name, field in known.items():
        if field.default is not UNSET and name not in _TOKENS:
            fields.setdefault(name, field.default)
    if fields["architectures"] is None:
        fields["architectures"] = known["architectures"].default
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    if fields["head_dim"] is None:
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    if fields["tie_word_embeddings"] is None:
        fields["tie_word_embeddings"] = False
    if fields["hidden_act"] == "swish":
        fields["hidden_act"] = "silu"
    if fields.get("mlp_only_layers", []) is None:
        fields["mlp_only_layers"] = []
    if fields.get("use_sliding_window") is False:
        fields["sliding_window"] = None


def _check_sizes(fields: dict[str, Any], model_type: ModelType, refuse: Refuse) -> None:
    for part, whole in (
        ("num_experts_per_tok", model_type.experts),
        ("num_key_value_heads", "num_attention_heads"),
    ):
        if fields[part] > fields[whole]:
            refuse(part, f"{part} is {fields[part]}, more than {whole}, which is {fields[whole]}")
    layers, experts = fields["num_hidden_layers"], fields[model_type.experts]
    if layers * experts > MOST_EXPERTS:
        refuse(
            model_type.experts,
            f"num_hidden_layers is {layers} and {model_type.experts} {experts}: over {MOST_EXPERTS} experts together",
        )
    heads, key_value_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    if heads % key_value_heads:
        message = f"num_attention_heads is {heads}, no multiple of num_key_value_heads, which is {key_value_heads}"
        refuse("num_key_value_heads", message)
    if fields["head_dim"] < 2 or fields["head_dim"] % 2:
        refuse(
            "head_dim",
            f"head_dim is {fields['head_dim']}, expected is an even number of at least 2",
        )
    if model_type.whole_heads and heads * fields["head_dim"] != fields["hidden_size"]:
        message = f"head_dim is {fields['head_dim']}, expected is hidden_size ({fields['hidden_size']}) divided by"
        refuse("head_dim", f"{message} num_attention_heads ({heads})")


def _check_tokens(
    fields: dict[str, Any], model_type: ModelType, notes: list[str], refuse: Refuse
) -> None:
    known = model_type.fields
    for name in _TOKENS:
        value = fields.get(name, known[name].default)
        if name not in fields and value is not None and value >= fields["vocab_size"]:
            value = None
        fields[name] = check_token(name, value, fields["vocab_size"], refuse)
        if value != fields[name]:
            notes.append(f"{name} {value} is taken as none")
