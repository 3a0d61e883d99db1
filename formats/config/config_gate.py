"""The gate for config.json: fields that may reach transformers, with bounds and defaults.

A config.json comes from a stranger. From some of its fields transformers selects code (attention
and expert kernels, remote classes, quantizers) or files, and numbers out of range fail late and far
from their cause. So transformers gets only the result of `gate_config` (docs/security.md).
"""

from typing import Any, NoReturn

from formats.config.field_rules import Refuse, short, take_field
from formats.config.model_types import MODEL_TYPES, UNSET, ModelType
from formats.config.rope_parameters import SOURCES, merge_rope
from formats.errors import MoeConvertError

RUN_TIME = (
    "transformers_version",
    "dtype",
    "max_position_embeddings",
    "rope_parameters",
    "initializer_range",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "attention_dropout",
    "num_experts_per_tok",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_jitter_noise",
)
"""Fields that a user may change in a converted folder. The others are fixed by the weights."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "is_causal": (None, True),
    "layer_types": (None, []),
    "per_layer_config": (None, {}),
    "attention_chunk_size": (None,),
    "kv_sharing_modes": (None, []),
    "compression_config": (None,),
}
"""Unsupported fields that change the model's results -> values that change nothing.

A field with any other value is refused; other unknown fields are dropped.
"""

MAX_MODEL_EXPERTS = 100_000
"""Bound on the experts of all layers. A false count costs memory before any tensor is read."""

_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
_COMPUTED = ("head_dim", "num_key_value_heads", "tie_word_embeddings")
"""Sizes that a config.json may omit: transformers computes them from others."""
_NOTED_FIELDS = 16


def gate_config(
    raw: Any, where: str, *, error: type[MoeConvertError], converted: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """Return the fields for transformers, and notes on dropped and replaced fields.

    The fields include all defaults, are in bounds and have one name each; they pass the gate again
    unchanged. A field that is not the model type's is dropped; in a converted folder (`converted`)
    it is refused, because the converter writes none. The caller checks quantization_config. Raises
    `error` with `where`, field and value.
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
    rules = model_type.fields
    notes: list[str] = []
    given = _without_aliases(raw, model_type, notes)
    known = {"model_type", *rules, *SOURCES, "quantization_config"}
    dropped = {name: value for name, value in given.items() if name not in known}
    for name, value in dropped.items():
        if converted:
            raise error(
                f"{where}: field {short(name)} is {short(value)};"
                " this field must not reach transformers",
                f"remove {short(name)} from config.json; docs/security.md lists the fields",
            )
        if value not in NEUTRAL.get(name, (value,)):
            refuse(name, f"{name} is {short(value)}, which is not supported")
    fields = {
        name: take_field(name, value, rules[name].rule, refuse) if name in rules else value
        for name, value in given.items()
        if name in rules or name == "model_type"
    }
    absent = [name for name in model_type.sizes if name not in fields and name not in _COMPUTED]
    if converted and absent:
        raise error(
            f"{where}: field {absent[0]} is missing",
            "get config.json again from where it was published",
        )
    if absent:
        defaults = ", ".join(f"{name} ({rules[name].default})" for name in absent)
        notes.append(f"left to transformers' defaults: {defaults}")
    _fill_defaults(fields, model_type)
    _check_counts(fields, model_type, refuse)
    _check_heads(fields, model_type, refuse)
    _check_tokens(fields, model_type, notes, refuse)
    rope, unread = merge_rope(
        given, fields["max_position_embeddings"], fields["head_dim"], model_type.rope_theta, refuse
    )
    fields["rope_parameters"] = rope
    if removed := {**dropped, **unread}:
        notes.append(dropped_note([f"{short(n)} ({short(v)})" for n, v in removed.items()]))
    return fields, notes


def dropped_note(fields: list[str]) -> str:
    """Return the note on dropped fields; of a long list it names the first ones."""
    named = fields[:_NOTED_FIELDS]
    if len(fields) > _NOTED_FIELDS:
        named.append(f"{len(fields) - _NOTED_FIELDS} more")
    return f"dropped, transformers never sees them: {', '.join(named)}"


def check_token(name: str, value: Any, vocab_size: int, refuse: Refuse) -> Any:
    """Check a token id, or a list of them, against the vocabulary.

    Returns None for -1, which means no token in many published files.
    """
    if value == -1:
        return None
    for token in value if isinstance(value, list) else [value]:
        if token is not None and not 0 <= token < vocab_size:
            refuse(
                name,
                f"{name} is {short(value)}, outside of the vocabulary of {vocab_size} tokens"
                " (vocab_size)",
            )
    return value


def _model_type(name: Any, refuse: Refuse) -> ModelType:
    if type(name) is not str or name not in MODEL_TYPES:
        supported = ", ".join(MODEL_TYPES)
        refuse("model_type", f"model_type is {short(name)}, this release supports {supported}")
    return MODEL_TYPES[name]


def _without_aliases(
    raw: dict[str, Any], model_type: ModelType, notes: list[str]
) -> dict[str, Any]:
    """Return `raw` with one name for each field.

    As in transformers, the alias of the experts overrides, and torch_dtype is overridden.
    """
    experts = model_type.experts
    experts_alias = model_type.experts_alias
    given = {name: raw[name] for name in raw if name not in (experts_alias, "torch_dtype")}
    for name, alias, by_precedence in (
        (experts, experts_alias, (experts_alias, experts)),
        ("dtype", "torch_dtype", ("dtype", "torch_dtype")),
    ):
        if alias not in raw:
            continue
        values = [(key, raw[key]) for key in by_precedence if raw.get(key) is not None]
        given[name] = values[0][1] if values else None
        if len(values) == 2 and values[0][1] != values[1][1]:
            notes.append(" overrides ".join(f"{key} ({short(value)})" for key, value in values))
    return given


def _fill_defaults(fields: dict[str, Any], model_type: ModelType) -> None:
    """Add transformers' defaults, and the numbers that it computes from others."""
    rules = model_type.fields
    for name, field in rules.items():
        if field.default is not UNSET and name not in _TOKENS:
            fields.setdefault(name, field.default)
    if fields["architectures"] is None:
        fields["architectures"] = rules["architectures"].default
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


def _check_counts(fields: dict[str, Any], model_type: ModelType, refuse: Refuse) -> None:
    for part, whole in (
        ("num_experts_per_tok", model_type.experts),
        ("num_key_value_heads", "num_attention_heads"),
    ):
        if fields[part] > fields[whole]:
            refuse(part, f"{part} is {fields[part]}, more than {whole}, which is {fields[whole]}")
    layers = fields["num_hidden_layers"]
    experts = fields[model_type.experts]
    if layers * experts > MAX_MODEL_EXPERTS:
        refuse(
            model_type.experts,
            f"num_hidden_layers is {layers} and {model_type.experts} {experts}:"
            f" over {MAX_MODEL_EXPERTS} experts together",
        )


def _check_heads(fields: dict[str, Any], model_type: ModelType, refuse: Refuse) -> None:
    heads = fields["num_attention_heads"]
    key_value_heads = fields["num_key_value_heads"]
    head_dim = fields["head_dim"]
    hidden_size = fields["hidden_size"]
    if heads % key_value_heads:
        refuse(
            "num_key_value_heads",
            f"num_attention_heads is {heads}, not a multiple of num_key_value_heads,"
            f" which is {key_value_heads}",
        )
    if head_dim < 2 or head_dim % 2:
        refuse("head_dim", f"head_dim is {head_dim}, expected an even number of at least 2")
    if model_type.whole_heads and heads * head_dim != hidden_size:
        refuse(
            "head_dim",
            f"head_dim is {head_dim}, expected hidden_size ({hidden_size})"
            f" divided by num_attention_heads ({heads})",
        )


def _check_tokens(
    fields: dict[str, Any], model_type: ModelType, notes: list[str], refuse: Refuse
) -> None:
    rules = model_type.fields
    vocab_size = fields["vocab_size"]
    for name in _TOKENS:
        value = fields.get(name, rules[name].default)
        # A default past the end of a small vocabulary means no token.
        if name not in fields and value is not None and value >= vocab_size:
            value = None
        fields[name] = check_token(name, value, vocab_size, refuse)
        if value != fields[name]:
            notes.append(f"{name} {value} means no token")
