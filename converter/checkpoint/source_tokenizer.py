"""The checkpoint's tokenizer: opened for calibration, and checked before a conversion begins."""

import logging
from pathlib import Path
from typing import Any

from converter.checkpoint.source import Checkpoint
from formats.config.checkpoint_config import model_type_in
from formats.config.tokenizer_files import open_tokenizer_by
from formats.errors import MoeConvertError, SourceError

_log = logging.getLogger(__name__)
_WITHOUT = "--calibrate random (or none) needs no tokenizer"


def open_source_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`, without code from there. TokenizerError."""
    from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

    # Without a config transformers would parse the folder's config.json, past our gate.
    kind = model_type_in(folder)
    config = AutoConfig.for_model(kind) if kind else PreTrainedConfig()
    options = {"config": config, "trust_remote_code": False, "local_files_only": True}
    return open_tokenizer_by(lambda path: AutoTokenizer.from_pretrained(path, **options), folder)


def check_source_tokenizer(checkpoint: Checkpoint, *, needed: bool) -> Any:
    """Loads the tokenizer, and compares its vocabulary with the rows of the embeddings; None if it
    cannot be loaded.

    needed: by the calibration. SourceError then where it cannot be loaded; else a warning. Tokens
    without a row are only warned of: many a vocabulary has more than its model, and a text need not
    use them.
    """
    folder, rows = checkpoint.folder, checkpoint.architecture.vocab_size
    try:
        tokenizer = open_source_tokenizer(folder)
        vocabulary: dict[str, int] = tokenizer.get_vocab()
    except MoeConvertError as e:
        if needed:
            raise SourceError(e.message, "; or ".join(filter(None, (e.hint, _WITHOUT)))) from e
        _log.warning(
            "the converted model has no usable tokenizer: %s",
            "; ".join(filter(None, (e.message, e.hint))),
        )
        return None
    beyond = sorted((number, token) for token, number in vocabulary.items() if number >= rows)
    if beyond:
        number, token = beyond[-1]
        _log.warning(
            "%s: the tokenizer has %d tokens beyond the model's %d embeddings, the last is %d (%r): a text with one of"
            " them is refused", folder, len(beyond), rows, number, token,
        )  # fmt: skip
    return tokenizer
