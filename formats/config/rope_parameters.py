"""Parameters of the rotary embedding, merged from several fields with transformers' precedence."""

from typing import Any

from formats.config.field_rules import (
    Flag,
    Integer,
    ListOf,
    Number,
    Refuse,
    Rule,
    optional,
    short,
    take_field,
)

SOURCES = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "original_max_position_embeddings",
    "partial_rotary_factor",
)
"""Fields of config.json that hold parameters of the rotary embedding."""

_ORIGINAL_LENGTH = "original_max_position_embeddings"
_FACTOR = Number(2**-10, 2**20)
_POSITIONS = Integer(2, 2**31)
_PER_FREQUENCY = ListOf(Number(1e-6, 1e6), 1 << 15)
_THETA = Number(2, 1e12)

TYPES: dict[str, dict[str, Rule]] = {
    "default": {},
    "linear": {"factor": _FACTOR},
    "dynamic": {"factor": _FACTOR},
    "yarn": {
        "factor": optional(_FACTOR),
        "original_max_position_embeddings": _POSITIONS,
        "attention_factor": optional(Number(0, 1e6)),
        "beta_fast": optional(Number(1e-6, 1e6)),
        "beta_slow": optional(Number(1e-6, 1e6)),
        "mscale": optional(Number(0, 1e3)),
        "mscale_all_dim": optional(Number(0, 1e3)),
        "truncate": Flag(),
    },
    "llama3": {
        "factor": _FACTOR,
        "original_max_position_embeddings": _POSITIONS,
        "low_freq_factor": Number(1e-6, 1e6),
        "high_freq_factor": Number(1e-6, 1e6),
    },
    "longrope": {
        "short_factor": _PER_FREQUENCY,
        "long_factor": _PER_FREQUENCY,
        "original_max_position_embeddings": _POSITIONS,
        "factor": optional(_FACTOR),
        "attention_factor": optional(Number(0, 1e6)),
    },
}
"""Type -> the parameters that transformers reads, besides rope_type and rope_theta."""
_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}


def merge_rope(
    config: dict[str, Any], positions: int, head_dim: int, default_theta: float, refuse: Refuse
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the parameters, with rope_type and rope_theta, and the given fields that are unused.

    `positions` is max_position_embeddings, `default_theta` the model type's default. Calls `refuse`
    for unknown types and for values out of range.
    """
    scaling = _object("rope_scaling", config.get("rope_scaling"), refuse)
    parameters = _object("rope_parameters", config.get("rope_parameters"), refuse)
    place = "rope_scaling" if scaling else "rope_parameters"
    given = scaling or parameters
    unread: dict[str, Any] = {}
    if scaling and parameters and parameters != scaling:
        unread["rope_parameters"] = parameters

    kind = given.get("rope_type", given.get("type", "default"))
    if type(kind) is not str or kind not in TYPES:
        refuse(place, f"{place}: type is {short(kind)}, known are {', '.join(TYPES)}")
    theta = _theta(config, given, place, default_theta, unread, refuse)
    rules = TYPES[kind]
    result: dict[str, Any] = {"rope_type": kind, "rope_theta": theta}
    for name in _REQUIRED.get(kind, ()):
        if name not in given:
            refuse(place, f"{place}.{name} is missing, which type {kind!r} needs")
    for name, value in given.items():
        if name in rules:
            result[name] = take_field(f"{place}.{name}", value, rules[name], refuse)
        elif name == "partial_rotary_factor":
            _check_rotation(f"{place}.{name}", value, refuse)
        elif name not in ("rope_type", "type", "rope_theta"):
            unread[f"{place}.{name}"] = value
    _check_rotation("partial_rotary_factor", config.get("partial_rotary_factor"), refuse)
    outer = config.get(_ORIGINAL_LENGTH)
    if _ORIGINAL_LENGTH not in rules:
        if outer is not None:
            unread[_ORIGINAL_LENGTH] = outer
    elif outer is not None:
        # In transformers, the outer field overrides the inner one.
        result[_ORIGINAL_LENGTH] = take_field(_ORIGINAL_LENGTH, outer, _POSITIONS, refuse)
    else:
        result.setdefault(_ORIGINAL_LENGTH, positions)
    _check_together(result, head_dim, place, refuse)
    return result, unread


def _object(name: str, value: Any, refuse: Refuse) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        refuse(name, f"{name} is {short(value)}, expected an object")
    return value or {}


def _theta(
    config: dict[str, Any],
    given: dict[str, Any],
    place: str,
    default: float,
    unread: dict[str, Any],
    refuse: Refuse,
) -> float:
    outer = None
    if "rope_theta" in config:
        outer = take_field("rope_theta", config["rope_theta"], _THETA, refuse)
    if "rope_theta" not in given:
        return default if outer is None else float(outer)
    theta = take_field(f"{place}.rope_theta", given["rope_theta"], _THETA, refuse)
    if outer not in (None, theta):
        unread["rope_theta"] = outer
    return float(theta)


def _check_rotation(name: str, value: Any, refuse: Refuse) -> None:
    """Refuse partial rotation: transformers ignores it for type "default" and fails for others."""
    if value not in (None, 1) or type(value) is bool:
        refuse(name, f"{name} is {short(value)}, expected 1: partial rotation is not supported")


def _check_together(rope: dict[str, Any], head_dim: int, place: str, refuse: Refuse) -> None:
    kind = rope["rope_type"]
    if kind == "dynamic" and head_dim < 4:
        refuse(
            place,
            f"{place}: type 'dynamic' needs a head_dim of at least 4, but head_dim is {head_dim}",
        )
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        low = rope["low_freq_factor"]
        high = rope["high_freq_factor"]
        refuse(
            place, f"{place}.high_freq_factor is {high}, not above low_freq_factor, which is {low}"
        )
    for name in ("short_factor", "long_factor"):
        if name in rope and len(rope[name]) != head_dim // 2:
            count = len(rope[name])
            refuse(
                place,
                f"{place}.{name} has {count} values, head_dim {head_dim} needs {head_dim // 2}",
            )
