"""What calibration runs through the model: windows of tokens from a text, from the shipped one, or
random.
"""

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import zstandard
from torch import Tensor

from converter.checkpoint.source import Checkpoint
from converter.checkpoint.source_tokenizer import open_source_tokenizer
from formats.errors import MoeConvertError, RecipeError, SourceError

KINDS = ("none", "random", "builtin", "file")
DEFAULT_TOKENS = 8192
MIN_TOKENS = 1024
WINDOW = 512
SEED = 0
RANDOM_SHARE = 0.25
"""Of the tokens, in `builtin` and `file`."""
RANDOM_WEIGHT = 0.25
"""What the random tokens weigh together. 0.25 did no worse than 0.5 in four comparisons: KL .00695
against .00706 and .00234 against .00247 on tiny-mixtral at 2 and 3 bits (docs/quality.md).
"""

BUILTIN = "calibration.txt.zst"
_MOST_TEXT_BYTES = 64 << 20
_MOST_UNKNOWN = 0.25
"""Of a text's tokens."""


@dataclass(frozen=True)
class CalibrationTokens:
    """windows: int64 [windows, window], each begun by BOS where there is one; weights: float32
    [windows], of a token of each window; sha256 of both.
    """

    kind: str
    windows: Tensor
    weights: Tensor

    @property
    def sha256(self) -> str:
        return hashlib.sha256(
            self.windows.numpy().tobytes() + self.weights.numpy().tobytes()
        ).hexdigest()


def calibration_tokens(
    checkpoint: Checkpoint, kind: str, tokens: int, file: Path | None = None, tokenizer: Any = None
) -> CalibrationTokens:
    """About `tokens` tokens (whole windows) for `checkpoint`.

    kind: "random", drawn uniformly from the vocabulary; "builtin", the text that the package ships,
    or "file", the UTF-8 text in `file`: windows from all over the text, and a share of random ones.
    The same for the same arguments.
    tokenizer: the checkpoint's, None to open it here.
    Raises SourceError for a text that cannot be read, is no UTF-8, or has too few tokens, and where
    the checkpoint's tokenizer cannot be loaded; RecipeError for too few tokens.
    """
    if tokens < MIN_TOKENS:
        raise RecipeError(
            f"--calibration-tokens {tokens}: fewer than {MIN_TOKENS} do harm",
            f"use {DEFAULT_TOKENS} or more",
        )
    a = checkpoint.architecture
    longest = [
        checkpoint.config.get("max_position_embeddings"),
        checkpoint.config.get("sliding_window"),
        WINDOW,
    ]
    window = min(n for n in longest if isinstance(n, int) and n > 0)
    bos = checkpoint.config.get("bos_token_id")
    bos = bos if isinstance(bos, int) and 0 <= bos < a.vocab_size else None
    n_windows = -(-tokens // window)
    n_random = n_windows if kind == "random" else max(1, round(n_windows * RANDOM_SHARE))
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.randint(a.vocab_size, (n_random, window), generator=generator)
    if kind == "random":
        windows, weights = drawn, torch.ones(n_random)
    else:
        where, text = _read(kind, file)
        ids = _encode(checkpoint, where, text, tokenizer)
        chosen = _spread(ids, n_windows - n_random, window - (bos is not None), where)
        if bos is not None:
            chosen = torch.nn.functional.pad(chosen, (1, 0), value=bos)
        windows = torch.cat([chosen, drawn])
        weights = torch.cat(
            [
                torch.full((len(chosen),), (1 - RANDOM_WEIGHT) * n_windows / len(chosen)),
                torch.full((n_random,), RANDOM_WEIGHT * n_windows / n_random),
            ]
        )
    if bos is not None:
        windows[:, 0] = bos
    return CalibrationTokens(kind, windows, weights)


def _read(kind: str, file: Path | None) -> tuple[str, str]:
    """(what to call it, the text)"""
    if kind == "builtin":
        data = resources.files("converter").joinpath("data", BUILTIN).read_bytes()
        return "the builtin text", zstandard.decompress(data).decode()
    if file is None:
        raise RecipeError("calibration by a file needs the file", "--calibrate TEXT.txt")
    where = str(file)
    try:
        with open(file, "rb") as f:
            data = f.read(_MOST_TEXT_BYTES + 1)
    except OSError as e:
        raise SourceError(
            f"{where}: {e.strerror}", "--calibrate takes none, random, builtin or a text file"
        ) from None
    if not data:
        raise SourceError(
            f"{where} is empty", "calibrate by a text of several kinds, 100 kB or more"
        )
    if len(data) > _MOST_TEXT_BYTES:
        raise SourceError(
            f"{where} has more than {_MOST_TEXT_BYTES} bytes", "a few megabytes are plenty"
        )
    try:
        return where, data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise SourceError(
            f"{where}: not UTF-8 at byte {e.start}", "save the text as UTF-8"
        ) from None


def _encode(checkpoint: Checkpoint, where: str, text: str, tokenizer: Any) -> Tensor:
    try:
        tokenizer = tokenizer or open_source_tokenizer(checkpoint.folder)
        # Piece by piece: some tokenizers take a time that grows with the square of the length.
        ids = [
            i
            for piece in _pieces(text)
            for i in tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        ]
    except MoeConvertError as e:
        raise SourceError(e.message, e.hint or "--calibrate random needs no tokenizer") from e
    except Exception as e:
        raise SourceError(
            f"{checkpoint.folder}: the tokenizer cannot read {where}: {type(e).__name__}: {e}",
            "--calibrate random needs no tokenizer",
        ) from None
    result = torch.tensor(ids, dtype=torch.int64)
    vocabulary = checkpoint.architecture.vocab_size
    if len(ids) and not 0 <= int(result.min()) <= int(result.max()) < vocabulary:
        raise SourceError(
            f"{checkpoint.folder}: the tokenizer gives {int(result.max())}, the model has {vocabulary} embeddings",
            "--calibrate random needs no tokenizer",
        )
    unknown = tokenizer.unk_token_id
    if (
        len(ids)
        and unknown is not None
        and (share := float((result == unknown).float().mean())) > _MOST_UNKNOWN
    ):
        raise SourceError(
            f"{checkpoint.folder}: to the tokenizer {share:.0%} of {where} is unknown",
            "give a text in the model's languages, or --calibrate random",
        )
    return result


def _pieces(text: str) -> list[str]:
    """The text cut after line ends, every 16,000 characters or so."""
    pieces, begin = [], 0
    while begin < len(text):
        end = text.find("\n", begin + 16000)
        end = len(text) if end < 0 else end + 1
        pieces.append(text[begin:end])
        begin = end
    return pieces


def _spread(ids: Tensor, count: int, width: int, where: str) -> Tensor:
    """`count` windows of `width` from all over `ids`, that do not overlap."""
    if len(ids) < count * width:
        raise SourceError(
            f"{where} has {len(ids)} tokens, {count * width} are needed",
            "give a longer text of several kinds, or fewer --calibration-tokens",
        )
    room = len(ids) - count * width
    starts = [i * width + (i * room // max(1, count - 1) if count > 1 else 0) for i in range(count)]
    return torch.stack([ids[start : start + width] for start in starts])
