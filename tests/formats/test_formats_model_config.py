"""The gate for config.json: a stranger's file reaches transformers only in known fields."""

import dataclasses
import inspect
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile_configs import CODE
from hypothesis import given, settings
from hypothesis import strategies as st
from project_paths import ROOT
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MixtralConfig,
    PreTrainedConfig,
)
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

from formats.config.config_gate import gate_config
from formats.config.generation_config import GENERATION_FIELDS
from formats.config.model_types import MODEL_TYPES
from formats.config.rope_parameters import TYPES
from formats.errors import FormatError, MoeConvertError, SourceError

SMALL: dict[str, Any] = {
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "vocab_size": 100,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
}
SMALL_BY_TYPE: dict[str, dict[str, Any]] = {
    "mixtral": SMALL,
    "qwen3_moe": {
        **{name: value for name, value in SMALL.items() if name != "num_local_experts"},
        "model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 48,
    },
    "olmoe": {
        **{name: value for name, value in SMALL.items() if name != "num_local_experts"},
        "model_type": "olmoe", "num_experts": 4,
    },
}  # fmt: skip
NOT_TAKEN = (
    "output_hidden_states",
    "return_dict",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
    "id2label",
    "label2id",
    "problem_type",
)
"""Fields that transformers declares and the gate drops: useless to a causal language model, and
they change the results of its calls.
"""
FIELDS = {"model_type"}.union(*(kind.fields for kind in MODEL_TYPES.values()))
every_type = pytest.mark.parametrize("kind", MODEL_TYPES)
PAGE = ROOT / "docs" / "security.md"
NEEDED: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 64,
    },
}


def gate(**fields: Any) -> tuple[dict[str, Any], list[str]]:
    return gate_config({**SMALL, **fields}, "config.json", error=SourceError)


def refuse(*words: str, converted: bool = False, **fields: Any) -> None:
    error = FormatError if converted else SourceError
    with pytest.raises(error) as caught:
        gate_config({**SMALL, **fields}, "config.json", error=error, converted=converted)
    for word in ("config.json", *words):
        assert word in caught.value.message
    assert caught.value.hint


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in SMALL.items() if key != name}


def declared(kind: str) -> set[str]:
    """Return the fields of a model type's configuration class in the installed transformers."""
    config_class = CONFIG_MAPPING[kind]
    if dataclasses.is_dataclass(config_class):
        return {field.name for field in dataclasses.fields(config_class)}
    # Earlier versions declare fields as arguments. num_labels and output_attentions are stored
    # under other names.
    arguments = (
        inspect.signature(base.__init__).parameters for base in (config_class, PreTrainedConfig)
    )
    return set().union(*arguments) - {"self", "kwargs", "num_labels", "output_attentions"}


@every_type
def test_every_field_that_transformers_declares_is_taken_or_left_out_on_purpose(kind: str) -> None:
    known = {"model_type", *MODEL_TYPES[kind].fields, *NOT_TAKEN, "rope_parameters"}
    assert declared(kind) - known == set(), "decide whether these may reach transformers"
    # transformers reads head_dim if present, though not every class declares it.
    assert known - declared(kind) <= {"model_type", "transformers_version", "head_dim"}


@every_type
def test_the_defaults_are_those_of_transformers(kind: str) -> None:
    plain = CONFIG_MAPPING[kind]()
    filled, _ = gate_config({"model_type": kind}, "config.json", error=SourceError)
    for name in filled.keys() - {"rope_parameters", "architectures", "head_dim"}:
        assert filled[name] == getattr(plain, name), name
    assert filled["head_dim"] == plain.hidden_size // plain.num_attention_heads
    assert filled["rope_parameters"] == plain.rope_parameters
    assert filled["architectures"] == [MODEL_FOR_CAUSAL_LM_MAPPING[type(plain)].__name__]


@every_type
def test_a_gated_config_passes_unchanged_and_gives_transformers_its_values(kind: str) -> None:
    fields, _ = gate_config(SMALL_BY_TYPE[kind], "config.json", error=SourceError)
    assert gate_config(fields, "again", error=FormatError, converted=True) == (fields, [])
    config = CONFIG_MAPPING[kind].from_dict(json.loads(json.dumps(fields)))
    for name in fields.keys() - {"dtype"}:
        assert getattr(config, name) == fields[name], name


@pytest.mark.parametrize("kind", ["llama", "qwen2_moe", "", None, 1, ["mixtral"]])
def test_a_model_type_that_is_not_tested_is_refused_by_name(kind: Any) -> None:
    refuse("model_type", ascii(kind), "mixtral, qwen3_moe, olmoe", model_type=kind)


def test_the_experts_of_qwen3_moe_have_two_names() -> None:
    given = {**SMALL_BY_TYPE["qwen3_moe"], "num_local_experts": 8}
    fields, notes = gate_config(given, "config.json", error=SourceError)
    assert fields["num_experts"] == CONFIG_MAPPING["qwen3_moe"](**given).num_experts == 8
    assert "num_local_experts (8) overrides num_experts (4)" in notes[0]


def test_a_sliding_window_that_is_not_used_is_none() -> None:
    given = {**SMALL_BY_TYPE["qwen3_moe"], "sliding_window": 64}
    for used, window in ((False, None), (True, 64)):
        fields, _ = gate_config(
            {**given, "use_sliding_window": used}, "config.json", error=SourceError
        )
        assert fields["sliding_window"] == window


def test_an_olmoe_whose_heads_are_not_as_wide_as_the_hidden_state_is_refused() -> None:
    with pytest.raises(SourceError, match="head_dim is 32, expected hidden_size"):
        gate_config({**SMALL_BY_TYPE["olmoe"], "head_dim": 32}, "config.json", error=SourceError)


@pytest.mark.parametrize("name", CODE)
def test_fields_that_select_code_are_left_out_of_a_source_and_refused_in_a_converted_folder(
    name: str,
) -> None:
    fields, notes = gate(**{name: CODE[name]})
    assert name not in fields
    assert len(notes) == 1
    assert ascii(name) in notes[0]
    refuse(ascii(name), converted=True, **{name: CODE[name]})


def test_notes_and_errors_hold_no_control_characters() -> None:
    hostile = {"\x1b[31m\u202e": "\x07\n"}
    assert all(note.isprintable() and note.isascii() for note in gate(**hostile)[1])
    with pytest.raises(FormatError) as caught:
        gate_config({**SMALL, **hostile}, "x", error=FormatError, converted=True)
    assert caught.value.message.isprintable()
    assert caught.value.hint.isprintable()


def test_thousands_of_unknown_fields_make_one_short_note() -> None:
    _, (note,) = gate(**{f"field_{n}": "x" * 1000 for n in range(5000)})
    assert len(note) < 4000
    assert "4984 more" in note


def test_missing_null_and_given_key_value_heads_are_read_as_transformers_does() -> None:
    assert gate(num_key_value_heads=None)[0]["num_key_value_heads"] == 4
    given = {**without("num_key_value_heads"), "num_attention_heads": 16}
    sixteen, _ = gate_config(given, "config.json", error=SourceError)
    assert sixteen["num_key_value_heads"] == 8


def test_head_dim_is_always_given_to_transformers() -> None:
    assert gate()[0]["head_dim"] == 16
    assert gate(head_dim=None)[0]["head_dim"] == 16
    assert gate(head_dim=32)[0]["head_dim"] == 32


@pytest.mark.parametrize("value", [10**400, -(10**400)])
def test_a_number_of_400_digits_is_refused(value: int) -> None:
    refuse("rms_norm_eps", rms_norm_eps=value)


def test_swish_is_silu() -> None:
    assert gate(hidden_act="swish")[0]["hidden_act"] == "silu"


def test_minus_one_is_no_token() -> None:
    fields, notes = gate(pad_token_id=-1)
    assert fields["pad_token_id"] is None
    assert "pad_token_id -1" in notes[0]


@pytest.mark.parametrize("name", ["pad_token_id", "bos_token_id", "eos_token_id"])
def test_a_token_behind_the_vocabulary_is_refused(name: str) -> None:
    refuse(name, "100", **{name: 100})
    assert gate(**{name: 99})[0][name] == 99


def test_the_number_of_experts_has_two_names() -> None:
    fields, notes = gate(num_experts=8)
    assert (
        fields["num_local_experts"]
        == MixtralConfig(num_experts=8, num_local_experts=4).num_local_experts
        == 8
    )
    assert "num_experts (8) overrides num_local_experts (4)" in notes[0]


def test_dtype_goes_before_torch_dtype() -> None:
    assert gate(torch_dtype="float16")[0]["dtype"] == "float16"
    assert gate(torch_dtype="float16", dtype="bfloat16")[0]["dtype"] == "bfloat16"
    refuse("dtype", "float8", dtype="float8")


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("form", ["rope_scaling type", "rope_scaling rope_type", "rope_parameters"])
def test_rope_parameters_are_those_that_transformers_computes_with(kind: str, form: str) -> None:
    place, _, key = form.partition(" ")
    if place == "rope_parameters":
        given: dict[str, Any] = {place: {"rope_type": kind, "rope_theta": 5000.0, **NEEDED[kind]}}
    else:
        given = {"rope_theta": 5000.0, place: {key: kind, **NEEDED[kind]}}
    fields, _ = gate(**given)
    assert fields.keys().isdisjoint({"rope_theta", "rope_scaling"})
    assert fields["rope_parameters"]["rope_theta"] == 5000.0
    theirs = MixtralConfig(**json.loads(json.dumps({**SMALL, "head_dim": 16, **given})))
    ours = MixtralConfig.from_dict(fields)
    one, other = MixtralRotaryEmbedding(ours), MixtralRotaryEmbedding(theirs)
    assert one.inv_freq.equal(other.inv_freq)
    assert one.attention_scaling == other.attention_scaling


def test_the_outer_pretraining_length_goes_before_the_inner_one_as_in_transformers() -> None:
    given = {
        "rope_scaling": {"type": "yarn", **NEEDED["yarn"]},
        "original_max_position_embeddings": 128,
    }
    fields, _ = gate(**given)
    theirs = MixtralRotaryEmbedding(MixtralConfig(**{**SMALL, "head_dim": 16, **given}))
    assert MixtralRotaryEmbedding(MixtralConfig.from_dict(fields)).inv_freq.equal(theirs.inv_freq)


def test_an_overridden_rope_theta_is_noted() -> None:
    fields, notes = gate(
        rope_theta=7000.0, rope_parameters={"rope_type": "default", "rope_theta": 5000.0}
    )
    assert fields["rope_parameters"] == {"rope_type": "default", "rope_theta": 5000.0}
    assert "7000" in notes[0]


def test_a_model_that_rotates_parts_of_heads_is_refused() -> None:
    refuse("partial_rotary_factor", partial_rotary_factor=0.5)


def test_a_converted_folder_must_have_the_sizes() -> None:
    with pytest.raises(FormatError, match="field num_experts_per_tok is missing"):
        gate_config(
            without("num_experts_per_tok"), "config.json", error=FormatError, converted=True
        )


def test_a_source_leaves_sizes_to_transformers_with_a_note() -> None:
    fields, notes = gate_config(without("num_experts_per_tok"), "config.json", error=SourceError)
    assert fields["num_experts_per_tok"] == 2
    assert notes == ["left to transformers' defaults: num_experts_per_tok (2)"]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.integers(0, 64)
    | st.text(max_size=8)
    | st.sampled_from([*TYPES, "silu", "float16", "mixtral"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                sorted(
                    {
                        "type",
                        "rope_type",
                        "rope_theta",
                        *(n for rules in TYPES.values() for n in rules),
                    }
                )
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=8,
)
NAMES = sorted(
    {*FIELDS, *NOT_TAKEN, "rope_parameters", "rope_scaling", "rope_theta", "num_experts", *CODE}
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4), st.booleans())
def test_any_object_is_refused_or_taken_by_transformers_and_passes_unchanged(
    changes: dict[str, Any], alone: bool
) -> None:
    raw = changes if alone else {**SMALL, **changes}
    try:
        fields, _ = gate_config(raw, "config.json", error=SourceError)
    except MoeConvertError as e:
        assert "config.json" in e.message
        assert e.hint
        return
    assert gate_config(
        json.loads(json.dumps(fields)), "again", error=FormatError, converted=True
    ) == (fields, [])
    config = MixtralConfig.from_dict(json.loads(json.dumps(fields)))
    if fields["head_dim"] <= 1024:
        assert MixtralRotaryEmbedding(config).inv_freq.isfinite().all()
    for name, value in fields.items():
        assert getattr(config, name) == value or name in ("dtype", "model_type"), name


def test_the_page_lists_the_fields() -> None:
    sections = re.split(r"^#+ ", PAGE.read_text(), flags=re.M)
    for title, names in (
        ("config.json", {*FIELDS, "rope_parameters"}),
        ("generation_config.json", set(GENERATION_FIELDS)),
        ("Rotary embedding", set(TYPES)),
    ):
        section = next(s for s in sections if s.startswith(f"{title}\n"))
        assert set(re.findall(r"^\| `(\w+)` \|", section, flags=re.M)) == names


@pytest.fixture
def edit(tmp_path: Path, source: Path) -> Callable[..., Path]:
    """Write the small checkpoint's config.json, with changes, into a folder."""

    def write(**changes: Any) -> Path:
        config = json.loads((source / "config.json").read_text()) | changes
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


def test_one_log_line_names_what_a_source_loses(
    edit: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    from formats.config.checkpoint_config import read_config

    folder = edit(auto_map={"AutoModel": "evil.Model"}, _attn_implementation="a/b", pad_token_id=-1)
    with caplog.at_level(logging.WARNING):
        read_config(folder)
        read_config(folder)
    (line,) = caplog.messages
    for word in (
        str(folder / "config.json"),
        "'auto_map'",
        "'_attn_implementation' ('a/b')",
        "pad_token_id -1",
    ):
        assert word in line
