"""The gate for generation_config.json: defaults of `generate` and their bounds.

All other fields are kept from transformers (docs/security.md): they select code (custom decoding,
caches, compilation, assistants), change the result type of `generate`, or need other arguments.
"""

from pathlib import Path
from typing import Any, NoReturn

from formats.config.config_gate import check_token, dropped_note
from formats.config.field_rules import (
    Either,
    Flag,
    Integer,
    ListOf,
    Number,
    Rule,
    Text,
    optional,
    short,
    take_field,
)
from formats.config.model_types import MAX_VOCABULARY
from formats.config.side_files import unusable
from formats.config.strict_json import dump, parse
from formats.errors import MoeConvertError
from formats.files.log_once import warn_once
from formats.files.paths import read_small, read_small_source

GENERATION_NAME = "generation_config.json"

_LENGTH = Integer(0, 1 << 31)
_TOKEN = Integer(-1, MAX_VOCABULARY)
_TOKENS = ListOf(Integer(0, MAX_VOCABULARY), 1 << 16)

GENERATION_FIELDS: dict[str, Rule] = {
    "pad_token_id": _TOKEN,
    "bos_token_id": _TOKEN,
    "eos_token_id": Either(_TOKEN, _TOKENS),
    "suppress_tokens": _TOKENS,
    "begin_suppress_tokens": _TOKENS,
    "max_length": Integer(1, 1 << 31),
    "max_new_tokens": Integer(1, 1 << 31),
    "min_length": _LENGTH,
    "min_new_tokens": _LENGTH,
    "do_sample": Flag(),
    "temperature": Number(0, 1e6),
    "top_k": Integer(0, 1 << 31),
    "top_p": Number(0, 1),
    "min_p": Number(0, 1),
    "typical_p": Number(0, 1),
    "epsilon_cutoff": Number(0, 1),
    "eta_cutoff": Number(0, 1),
    "repetition_penalty": Number(1e-6, 1e6),
    "no_repeat_ngram_size": Integer(0, 1 << 20),
    "renormalize_logits": Flag(),
    "remove_invalid_values": Flag(),
    "use_cache": Flag(),
    "transformers_version": Text(),
    "_from_model_config": Flag(),
}
"""Fields that may reach transformers. Each may be null."""


def read_generation_config(
    folder: Path, vocab_size: int, *, error: type[MoeConvertError], converted: bool = False
) -> dict[str, Any] | None:
    """Read and gate generation_config.json of `folder`; None if there is no such file.

    One log line names the fields that were dropped or replaced. Raises `error` with the file, field
    and value.
    """
    if not (folder / GENERATION_NAME).exists():
        return None
    where = str(folder / GENERATION_NAME)
    if not converted and (problem := unusable(folder / GENERATION_NAME)):
        raise error(f"{where}: {problem[0]}", problem[1])
    read = read_small if converted else read_small_source
    raw = parse(read(folder, GENERATION_NAME, str(folder)), where, error=error)
    fields, notes = gate_generation_config(
        raw, where, error=error, vocab_size=vocab_size, converted=converted
    )
    if notes:
        warn_once(f"{where}: {'; '.join(notes)}")
    return fields


def clean_generation_config(data: bytes, where: str, *, error: type[MoeConvertError]) -> bytes:
    """Remove the fields that the gate drops. Returns `data` itself if there are none."""
    raw = parse(data, where, error=error)
    fields, _ = gate_generation_config(raw, where, error=error)
    return data if fields == raw else dump(fields)


def gate_generation_config(
    raw: Any,
    where: str,
    *,
    error: type[MoeConvertError],
    vocab_size: int = MAX_VOCABULARY,
    converted: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """Return the fields for transformers, and notes on dropped and replaced fields.

    Drops fields outside of GENERATION_FIELDS; in a converted folder (`converted`) it refuses them.
    """

    def refuse(field: str, message: str) -> NoReturn:
        raise error(f"{where}: {message}", f"correct {field} in {GENERATION_NAME}, or remove it")

    if not isinstance(raw, dict):
        raise error(f"{where}: not an object", f"get {GENERATION_NAME} again, or remove it")
    fields: dict[str, Any] = {}
    notes: list[str] = []
    dropped: list[str] = []
    for name, value in raw.items():
        if name in GENERATION_FIELDS:
            taken = take_field(name, value, optional(GENERATION_FIELDS[name]), refuse)
            if name.endswith(("_token_id", "_tokens")) and not name.startswith(("max_", "min_")):
                taken = check_token(name, taken, vocab_size, refuse)
            if taken is None and value is not None:
                notes.append(f"{name} {value} means no token")
            fields[name] = taken
        elif converted:
            raise error(
                f"{where}: field {short(name)} is {short(value)};"
                " this field must not reach transformers",
                f"remove {short(name)} from {GENERATION_NAME}; generate() takes it as an argument",
            )
        else:
            dropped.append(f"{short(name)} ({short(value)})")
    if dropped:
        notes.append(dropped_note(dropped))
    return fields, notes
