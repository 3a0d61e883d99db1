"""The checkpoint's tokenizer: opened for calibration, checked before a conversion begins."""

import logging
from typing import Any

from converter.checkpoint.source import Checkpoint
from formats.config.checkpoint_config import model_type_in
from formats.config.tokenizer_files import open_tokenizer_by
from formats.errors import MoeConvertError, SourceError

_log = logging.getLogger(__name__)
_NO_TOKENIZER_HINT = "--calibrate random (or none) needs no tokenizer"


def open_source_tokenizer(checkpoint: Checkpoint) -> Any:
    """Return the checkpoint's tokenizer, or its adapter's; no code from there runs.

    Raises TokenizerError.
    """
    from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

    folder = checkpoint.tokenizer_folder
    # Without a config transformers would parse the folder's config.json without our checks.
    model_type = model_type_in(checkpoint.folder)
    config = AutoConfig.for_model(model_type) if model_type else PreTrainedConfig()
    options = {"config": config, "trust_remote_code": False, "local_files_only": True}
    return open_tokenizer_by(lambda path: AutoTokenizer.from_pretrained(path, **options), folder)


def check_source_tokenizer(checkpoint: Checkpoint, *, needed: bool) -> Any:
    """Load the tokenizer and compare its vocabulary with the embeddings; None if it cannot load.

    needed: by the calibration; a tokenizer that cannot load is then a SourceError, else a warning.
    Tokens without an embedding only give a warning: many vocabularies have more tokens than the
    model, and a text may not use them.
    """
    folder = checkpoint.tokenizer_folder
    embeddings = checkpoint.architecture.vocab_size
    try:
        tokenizer = open_source_tokenizer(checkpoint)
        vocabulary: dict[str, int] = tokenizer.get_vocab()
    except MoeConvertError as e:
        if needed:
            hints = [hint for hint in (e.hint, _NO_TOKENIZER_HINT) if hint]
            raise SourceError(e.message, "; or ".join(hints)) from e
        reason = f"{e.message}; {e.hint}" if e.hint else e.message
        _log.warning("the converted model has no usable tokenizer: %s", reason)
        return None
    beyond = sorted((number, token) for token, number in vocabulary.items() if number >= embeddings)
    if beyond:
        number, token = beyond[-1]
        _log.warning(
            "%s: the tokenizer has %d tokens beyond the model's %d embeddings, the last is %d (%r):"
            " a text with one of them is refused",
            folder,
            len(beyond),
            embeddings,
            number,
            token,
        )
    return tokenizer
