"""Calibration tokens: windows of a text or of random tokens."""

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
"""Share of random tokens in the kinds `builtin` and `file`."""
RANDOM_WEIGHT = 0.25
"""Share of the random tokens in the total weight. On tiny-mixtral at 2 and 3 bits, 0.25 gives KL
.00695 and .00234, 0.5 gives .00706 and .00247 (docs/quality.md).
"""

BUILTIN = "calibration.txt.zst"
_MAX_TEXT_BYTES = 64 << 20
_MAX_UNKNOWN = 0.25
"""Largest share of unknown tokens in a text."""


@dataclass(frozen=True)
class CalibrationTokens:
    """Windows of tokens, and the weight of a token in each window.

    windows: int64 [windows, window]; each starts with BOS if the model has one. weights: float32
    [windows].
    """

    kind: str
    windows: Tensor
    weights: Tensor

    @property
    def sha256(self) -> str:
        """Hash of windows and weights, in hex."""
        return hashlib.sha256(
            self.windows.numpy().tobytes() + self.weights.numpy().tobytes()
        ).hexdigest()


def calibration_tokens(
    checkpoint: Checkpoint, kind: str, tokens: int, file: Path | None = None, tokenizer: Any = None
) -> CalibrationTokens:
    """Return about `tokens` tokens, in whole windows; the same arguments give the same tokens.

    kind: "random" draws uniformly from the vocabulary. "builtin" (a text in the package) and "file"
    (the UTF-8 text in `file`) take windows spread over the text, and RANDOM_SHARE random tokens.
    tokenizer: the checkpoint's; None opens it.

    Raises SourceError for a text that cannot be read, is not UTF-8 or is too short, or a tokenizer
    that cannot be loaded; RecipeError for `tokens` below MIN_TOKENS.
    """
    if tokens < MIN_TOKENS:
        raise RecipeError(
            f"--calibration-tokens {tokens}: fewer than {MIN_TOKENS} make quality worse",
            f"use {DEFAULT_TOKENS} or more",
        )
    vocabulary = checkpoint.architecture.vocab_size
    limits = [
        checkpoint.config.get("max_position_embeddings"),
        checkpoint.config.get("sliding_window"),
        WINDOW,
    ]
    window = min(n for n in limits if isinstance(n, int) and n > 0)
    bos = checkpoint.config.get("bos_token_id")
    bos = bos if isinstance(bos, int) and 0 <= bos < vocabulary else None
    n_windows = -(-tokens // window)
    n_random = n_windows if kind == "random" else max(1, round(n_windows * RANDOM_SHARE))
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.randint(vocabulary, (n_random, window), generator=generator)
    if kind == "random":
        windows = drawn
        weights = torch.ones(n_random)
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
    """Return the text and, first, its name for messages."""
    if kind == "builtin":
        data = resources.files("converter").joinpath("data", BUILTIN).read_bytes()
        return "the builtin text", zstandard.decompress(data).decode()
    if file is None:
        raise RecipeError("calibrate is file, but no text file is given", "--calibrate TEXT.txt")
    where = str(file)
    try:
        with open(file, "rb") as f:
            data = f.read(_MAX_TEXT_BYTES + 1)
    except OSError as e:
        raise SourceError(
            f"{where}: {e.strerror}", "--calibrate takes none, random, builtin or a text file"
        ) from None
    if not data:
        raise SourceError(f"{where} is empty", "use a text of several kinds, 100 kB or more")
    if len(data) > _MAX_TEXT_BYTES:
        raise SourceError(
            f"{where} has more than {_MAX_TEXT_BYTES} bytes", "a few megabytes are enough"
        )
    try:
        return where, data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise SourceError(
            f"{where}: not UTF-8 at byte {e.start}", "save the text as UTF-8"
        ) from None


def _encode(checkpoint: Checkpoint, where: str, text: str, tokenizer: Any) -> Tensor:
    try:
        tokenizer = tokenizer or open_source_tokenizer(checkpoint)
        # The time of some tokenizers grows with the square of the length, so the text is split.
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
            f"{checkpoint.folder}: the tokenizer gives the token {int(result.max())},"
            f" but the model has {vocabulary} embeddings",
            "--calibrate random needs no tokenizer",
        )
    unknown = tokenizer.unk_token_id
    if (
        len(ids)
        and unknown is not None
        and (share := float((result == unknown).float().mean())) > _MAX_UNKNOWN
    ):
        raise SourceError(
            f"{checkpoint.folder}: {share:.0%} of {where} is unknown to the tokenizer",
            "use a text in the model's languages, or --calibrate random",
        )
    return result


def _pieces(text: str) -> list[str]:
    """Return the text in pieces of about 16,000 characters, split after line ends."""
    pieces = []
    begin = 0
    while begin < len(text):
        end = text.find("\n", begin + 16000)
        end = len(text) if end < 0 else end + 1
        pieces.append(text[begin:end])
        begin = end
    return pieces


def _spread(ids: Tensor, count: int, width: int, where: str) -> Tensor:
    """Return `count` windows, int64 [count, width], spread over `ids` without overlap."""
    if len(ids) < count * width:
        raise SourceError(
            f"{where} has {len(ids)} tokens, {count * width} are needed",
            "use a longer text of several kinds, or fewer --calibration-tokens",
        )
    spare = len(ids) - count * width
    starts = [i * width + i * spare // max(1, count - 1) for i in range(count)]
    return torch.stack([ids[start : start + width] for start in starts])
