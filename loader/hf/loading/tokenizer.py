"""Loads the tokenizer of a folder, and checks token ids against the model's vocabulary."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from formats import INDEX_NAME, PENDING_NAME
from formats.config.checkpoint_config import model_type_in
from formats.config.side_files import is_read_by_transformers
from formats.config.tokenizer_files import open_tokenizer_by
from formats.errors import MoeConvertError, TokenizerError
from formats.index import read_index
from formats.reading.whole_files import check_files
from loader.hf.loading.listed_files import link_listed_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONVERTED_HINT = (
    "put the tokenizer's files beside the checkpoint's weights and convert it again; in Python,"
    " load another folder's tokenizer: loader.load_tokenizer(FOLDER)"
)
_PLAIN_HINT = "put the model's tokenizer files into this folder"


def open_tokenizer(folder: Path, check: str = "fast") -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a plain checkpoint or of a converted, perhaps incomplete, folder.

    check: "none" skips the comparison of a converted folder's files with the index.

    Raises TokenizerError if the files make no tokenizer; for a converted folder also FormatError,
    or DamageError for a file that differs from the index.
    """
    name = next((name for name in (INDEX_NAME, PENDING_NAME) if (folder / name).exists()), None)
    if name is None:
        try:
            return _open(folder)
        except TokenizerError as e:
            raise TokenizerError(e.message, e.hint or _PLAIN_HINT) from e
    index = read_index(folder, name)
    if check != "none":
        check_files(folder, index, sorted(filter(is_read_by_transformers, index.whole_files)))
    with link_listed_files(folder, index, is_read_by_transformers) as files:
        try:
            tokenizer = _open(files)
        except TokenizerError as e:
            message, hint = (text.replace(str(files), str(folder)) for text in (e.message, e.hint))
            raise TokenizerError(message, hint or _CONVERTED_HINT) from e
    tokenizer.name_or_path = str(folder)
    return tokenizer


def _open(folder: Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

    # Without a config, transformers would parse the folder's config.json, which is not gated here.
    model_type = model_type_in(folder)
    config = AutoConfig.for_model(model_type) if model_type else PreTrainedConfig()
    options = {"config": config, "trust_remote_code": False, "local_files_only": True}
    return open_tokenizer_by(lambda path: AutoTokenizer.from_pretrained(path, **options), folder)


def check_tokens(ids: Tensor, tokenizer: Any, rows: int, where: str) -> None:
    """Raise MoeConvertError naming the first token id outside 0 to rows - 1.

    ids: int64 [n]. rows: number of the model's embeddings. where: the text's name in the error.
    """
    beyond = ids[(ids < 0) | (ids >= rows)]
    if len(beyond):
        number = int(beyond[0])
        raise MoeConvertError(
            f"{where}: token {number} ({tokenizer.convert_ids_to_tokens(number)!r}) is beyond the"
            f" model's {rows} embeddings: the tokenizer belongs to another model, or tokens were"
            " added to it later",
            "remove the token from the text, or use the model's tokenizer",
        )


def embedding_rows(model: Any) -> int:
    """Return the number of rows of the model's input embeddings."""
    return int(model.get_input_embeddings().weight.shape[0])
