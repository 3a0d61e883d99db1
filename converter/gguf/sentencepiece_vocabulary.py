"""Scores of SentencePiece pieces, from the merges of tokenizer.json.

transformers merges the pair with the lowest rank. llama.cpp merges the two neighbours whose joined
text is the piece with the highest score. Both agree if each piece's merges have neighbouring ranks,
and if every split of a piece into two pieces is a merge. SentencePiece's own models satisfy this.
"""

from typing import Any

from converter.gguf import RUN_HINT
from formats.errors import TokenizerError

SPACE = "▁"
_PREPEND = {"type": "Prepend", "prepend": SPACE}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_UNMERGED = -1e6
"""Score of a piece that no merge makes: a character or byte, where llama.cpp starts."""


def piece_scores(parts: dict[str, Any], n_tokens: int, where: str) -> list[float]:
    """Return the score of each token id.

    parts: tokenizer.json. Raises TokenizerError if no scores give the same tokens as the merges.
    """
    vocab: dict[str, int] = parts["model"]["vocab"]
    scores = [_UNMERGED] * n_tokens
    splits: dict[str, set[str]] = {}
    last = None
    for rank, (left, right) in enumerate(parts["model"]["merges"]):
        piece = left + right
        if piece != last and piece in splits:
            raise _refusal(where, f"the merges of {piece!r} do not follow each other")
        last = piece
        splits.setdefault(piece, set()).add(left)
        scores[vocab[piece]] = max(scores[vocab[piece]], -float(rank))
    added = {token["content"] for token in parts["added_tokens"]}
    for piece in vocab.keys() - added:
        for i in range(1, len(piece)):
            left = piece[:i]
            if left in vocab and piece[i:] in vocab and left not in splits.get(piece, ()):
                if _is_unreachable(left, splits) or _is_unreachable(piece[i:], splits):
                    continue
                raise _refusal(where, f"{left!r} + {piece[i:]!r} is not a merge")
    return scores


def has_space_prefix(parts: dict[str, Any], where: str) -> bool:
    """Return True if a space is put before the text.

    Raises TokenizerError for normalizers and pre-tokenizers other than SentencePiece's.
    """
    normalizer = parts["normalizer"]
    pre = parts["pre_tokenizer"]
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    if pre is None and steps in ([_PREPEND, _REPLACE], [_REPLACE]):
        return bool(steps[0] == _PREPEND)
    if not steps and _is_metaspace(pre or {}):
        return bool(pre["prepend_scheme"] != "never")
    raise _refusal(where, f"its normalizer is {normalizer} and its pre-tokenizer is {pre}")


def _is_metaspace(pre: dict[str, Any]) -> bool:
    """Return True if the pre-tokenizer only replaces spaces, and does not split the text."""
    return (
        pre.get("type") == "Metaspace"
        and pre["replacement"] == SPACE
        and not pre.get("split", True)
    )


def _is_unreachable(text: str, splits: dict[str, set[str]]) -> bool:
    """Return True if no merge makes a text of several characters."""
    return len(text) > 1 and text not in splits


def _refusal(where: str, why: str) -> TokenizerError:
    return TokenizerError(
        f"{where}: the tokenizer cannot be exported to GGUF: {why};"
        " llama.cpp would split text into other tokens",
        RUN_HINT,
    )
