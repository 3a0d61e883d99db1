"""The tokenizer as GGUF metadata.

The source is the tokenizer that transformers built, so that all kinds of tokenizer files have one
path. llama.cpp knows two kinds here: `llama` merges pieces by score (SentencePiece), and `gpt2`
merges pairs of bytes by rank.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf import GGUFWriter, Keys, TokenType

from converter.gguf import RUN_HINT
from converter.gguf.byte_level_vocabulary import merge_texts, pre_tokenizer_name
from converter.gguf.sentencepiece_vocabulary import SPACE, has_space_prefix, piece_scores
from formats.errors import TokenizerError
from formats.files.log_once import warn_once

_BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))


@dataclass(frozen=True)
class Vocabulary:
    """All fields of `tokenizer.ggml`, by token id where they are lists."""

    model: str
    """`llama` or `gpt2`."""
    pre: str
    """Name of the pre-tokenizer in llama.cpp."""
    tokens: list[str]
    types: list[TokenType]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    special_ids: dict[str, int] = field(default_factory=dict)
    """bos, eos, eot, unk, pad -> token id."""
    adds_bos: bool = False
    adds_eos: bool = False
    adds_space: bool = False
    """True if a space is put before the text."""
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    """Name -> Jinja template. Names hold letters, digits and underscores."""

    def add_to(self, writer: GGUFWriter) -> None:
        """Add the fields to the metadata."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, number in self.special_ids.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(self.adds_eos)
        writer.add_add_space_prefix(self.adds_space)
        if "default" in self.chat_templates:
            writer.add_chat_template(self.chat_templates["default"])
        # Not by add_chat_template, which orders the names differently in each process.
        named = sorted(self.chat_templates.keys() - {"default"})
        for name in named:
            key = Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name)
            writer.add_string(key, self.chat_templates[name])
        writer.add_array(Keys.Tokenizer.CHAT_TEMPLATES, named)


def read_vocabulary(tokenizer: Any, config: Mapping[str, Any], where: str) -> Vocabulary:
    """Return the vocabulary of a transformers tokenizer, padded to the model's vocab_size.

    config: config.json, for token ids that the tokenizer does not name. where: the folder, for
    messages. Raises TokenizerError, with the part's name, for a tokenizer that llama.cpp would
    imitate wrongly, or one with more tokens than the model.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TokenizerError(
            f"{where}: {type(tokenizer).__name__} has no tokenizer.json to export", RUN_HINT
        )
    parts = json.loads(backend.to_str())
    if parts["model"].get("type") != "BPE":
        raise TokenizerError(
            f"{where}: the tokenizer's model is {parts['model'].get('type')}, expected BPE:"
            " other kinds cannot be exported to GGUF yet",
            RUN_HINT,
        )
    ids = _special_ids(tokenizer, config)
    tokens, types = _tokens(parts, ids.get("unk"), config["vocab_size"], where)
    encoded = tokenizer("a")["input_ids"]
    common: dict[str, Any] = {
        "tokens": tokens,
        "types": types,
        "special_ids": ids,
        "adds_bos": bool(encoded) and encoded[0] == ids.get("bos"),
        "adds_eos": bool(encoded) and encoded[-1] == ids.get("eos"),
        "chat_templates": _chat_templates(tokenizer),
    }
    if parts["model"]["byte_fallback"]:
        return Vocabulary(
            model="llama",
            pre="default",
            scores=piece_scores(parts, len(tokens), where),
            adds_space=has_space_prefix(parts, where),
            **common,
        )
    return Vocabulary(
        model="gpt2",
        pre=pre_tokenizer_name(parts, where),
        merges=merge_texts(parts),
        **common,
    )


def _tokens(
    parts: dict[str, Any], unknown: int | None, vocab_size: int, where: str
) -> tuple[list[str], list[TokenType]]:
    """Return texts and types by token id. Ids without a token become unused.

    unknown: id of the token for unknown characters.
    """
    added = {token["id"]: token for token in parts["added_tokens"]}
    text_by_id = {number: text for text, number in parts["model"]["vocab"].items()}
    text_by_id |= {number: token["content"] for number, token in added.items()}
    if (largest := max(text_by_id)) >= vocab_size:
        raise TokenizerError(
            f"{where}: token {largest} ({text_by_id[largest]!r}) is beyond the model's"
            f" {vocab_size} embeddings",
            "use the model's own tokenizer, and convert again",
        )
    is_pieces = parts["model"]["byte_fallback"]
    tokens = []
    types = []
    for number in range(vocab_size):
        text = text_by_id.get(number)
        if text is None:
            tokens.append(f"[PAD{number}]")
            types.append(TokenType.UNUSED)
            continue
        is_user_defined = number in added and not added[number]["special"]
        # llama.cpp looks for these in the text before it replaces spaces.
        tokens.append(text.replace(SPACE, " ") if is_pieces and is_user_defined else text)
        if is_pieces and number == unknown:
            types.append(TokenType.UNKNOWN)
        elif number in added:
            types.append(TokenType.USER_DEFINED if is_user_defined else TokenType.CONTROL)
        elif is_pieces and text in _BYTE_TOKENS:
            types.append(TokenType.BYTE)
        else:
            types.append(TokenType.NORMAL)
    return tokens, types


def _special_ids(tokenizer: Any, config: Mapping[str, Any]) -> dict[str, int]:
    """Return bos, eos, unk and pad, and as eot a second token that ends an answer."""
    ends = config.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    given = {"bos": config.get("bos_token_id"), "eos": ends[0] if ends else None}
    ids = {}
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        number = given.get(name) if number is None else number
        if number is not None and number >= 0:
            ids[name] = number
    if others := [number for number in ends if number not in (None, ids.get("eos"))]:
        ids["eot"] = others[0]
        if left_out := others[1:]:
            warn_once(
                "GGUF has fields for two tokens that end an answer; it leaves out"
                f" {left_out} of the configuration's eos_token_id {ends}"
            )
    return ids


def _chat_templates(tokenizer: Any) -> dict[str, str]:
    template = tokenizer.chat_template
    if not isinstance(template, dict):
        return {"default": template} if template else {}
    return {re.sub("[^A-Za-z0-9]", "_", name): text for name, text in template.items()}
