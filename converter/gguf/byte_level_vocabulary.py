"""Merges and pre-tokenizer of a byte-level BPE tokenizer."""

from typing import Any

from converter.gguf import RUN_HINT
from formats.errors import TokenizerError

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def merge_texts(parts: dict[str, Any]) -> list[str]:
    """Return the merges as `left right`. parts: tokenizer.json.

    Byte-level tokens have no spaces.
    """
    return [" ".join(pair) for pair in parts["model"]["merges"]]


def pre_tokenizer_name(parts: dict[str, Any], where: str) -> str:
    """Return llama.cpp's name of the pre-tokenizer. Raises TokenizerError if it has none here."""
    normalizer = parts["normalizer"]
    pre = parts["pre_tokenizer"] or {}
    ignores_merges = parts["model"].get("ignore_merges", False)
    if normalizer is None:
        if _is_byte_level(pre, use_regex=True) and not ignores_merges:
            return "gpt-2"
        steps = pre.get("pretokenizers", [])
        if len(steps) == 2 and _is_byte_level(steps[1], use_regex=False):
            split = steps[0]
            if split.get("pattern") == {"Regex": _LLAMA_3} and ignores_merges:
                return "llama-bpe"
    raise TokenizerError(
        f"{where}: the tokenizer cannot be exported to GGUF: normalizer {normalizer},"
        f" pre-tokenizer {pre}; known: GPT-2's and Llama 3's",
        RUN_HINT,
    )


def _is_byte_level(pre: dict[str, Any], *, use_regex: bool) -> bool:
    return (
        pre.get("type") == "ByteLevel"
        and not pre["add_prefix_space"]
        and pre["use_regex"] == use_regex
    )
