"""The gate for generation_config.json: the defaults of `generate` that may reach transformers, each
with its bounds.

Other fields select code (custom decoding, caches, compilation, assistants), change what `generate`
returns, or need arguments beside them; they never reach transformers (docs/security.md).
"""

from pathlib import Path
from typing import Any, NoReturn

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
from formats.config.model_config import check_token
from formats.config.model_types import MOST_TOKENS
from formats.config.side_files import unusable
from formats.config.strict_json import dump, parse
from formats.errors import MoeConvertError
from formats.files.log_once import warn_once
from formats.files.paths import read_small, read_small_source

GENERATION_NAME = "generation_config.json"

_LENGTH = Integer(0, 1 << 31)
_TOKEN = Integer(-1, MOST_TOKENS)
_TOKENS = ListOf(Integer(0, MOST_TOKENS), 1 << 16)

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
"""What may reach transformers; each may be null."""


def gate_generation_config(
    raw: Any,
    where: str,
    *,
    error: type[MoeConvertError],
    vocab_size: int = MOST_TOKENS,
    converted: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """(the fields that transformers may get, notes on what was left out or replaced) of
    generation_config.json's value.

    A field outside of GENERATION_FIELDS is left out; in a converted folder (`converted`) it is
    refused. Raises `error` naming `where`, field and value.
    """

    def refuse(field: str, message: str) -> NoReturn:
        raise error(f"{where}: {message}", f"correct {field} in {GENERATION_NAME}, or remove it")

    if not isinstance(raw, dict):
        raise error(f"{where}: not an object", f"get {GENERATION_NAME} again, or remove it")
    fields: dict[str, Any] = {}
    notes: list[str] = []
    left_out: list[str] = []
    for name, value in raw.items():
        if name in GENERATION_FIELDS:
            taken = take_field(name, value, optional(GENERATION_FIELDS[name]), refuse)
            if name.endswith(("_token_id", "_tokens")) and not name.startswith(("max_", "min_")):
                taken = check_token(name, taken, vocab_size, refuse)
            if taken is None and value is not None:
                notes.append(f"{name} {value} is taken as none")
            fields[name] = taken
        elif converted:
            raise error(
                f"{where}: field {short(name)} is {short(value)}: it is not among those that transformers may get",
                f"remove {short(name)} from {GENERATION_NAME}; generate() takes it as an argument",
            )
        else:
            left_out.append(f"{short(name)} ({short(value)})")
    if left_out:
        more = [f"{len(left_out) - 16} more"] if len(left_out) > 16 else []
        notes.append(f"left out, transformers never gets them: {', '.join(left_out[:16] + more)}")
    return fields, notes


def read_generation_config(
    folder: Path, vocab_size: int, *, error: type[MoeConvertError], converted: bool = False
) -> dict[str, Any] | None:
    """The gated generation_config.json of `folder`, None where there is none; errors as
    `gate_generation_config`.

    One log line says what was left out or replaced.
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
    """generation_config.json without what the gate leaves out: `data` itself where that is nothing."""
    raw = parse(data, where, error=error)
    fields, _ = gate_generation_config(raw, where, error=error)
    return data if fields == raw else dump(fields)
