"""The tokenizer of a folder, and its tokens for a model: those that the model has embeddings of."""

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

_AGAIN_HINT = (
    "put the tokenizer's files beside the checkpoint's weights and convert it again; in Python, any folder's"
    " tokenizer will do: loader.load_tokenizer(FOLDER)"
)

_ORDINARY_HINT = "put the model's own tokenizer files there"


def tokenizer_of(folder: Path, check: str = "fast") -> "PreTrainedTokenizerBase":
    """The tokenizer in a converted folder, which may be incomplete, or in an ordinary checkpoint.
    TokenizerError, and of a converted folder FormatError; unless `check` is "none", DamageError for
    a file that is not as it was written.
    """
    name = next((name for name in (INDEX_NAME, PENDING_NAME) if (folder / name).exists()), None)
    if name is None:
        try:
            return _open(folder)
        except TokenizerError as e:
            raise TokenizerError(e.message, e.hint or _ORDINARY_HINT) from e
    index = read_index(folder, name)
    if check != "none":
        check_files(folder, index, sorted(filter(is_read_by_transformers, index.whole_files)))
    with link_listed_files(folder, index, is_read_by_transformers) as files:
        try:
            tokenizer = _open(files)
        except TokenizerError as e:
            message, hint = (text.replace(str(files), str(folder)) for text in (e.message, e.hint))
            raise TokenizerError(message, hint or _AGAIN_HINT) from e
    tokenizer.name_or_path = str(folder)
    return tokenizer


def _open(folder: Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

    # Without a config transformers would parse the folder's config.json, past our gate.
    kind = model_type_in(folder)
    config = AutoConfig.for_model(kind) if kind else PreTrainedConfig()
    options = {"config": config, "trust_remote_code": False, "local_files_only": True}
    return open_tokenizer_by(lambda path: AutoTokenizer.from_pretrained(path, **options), folder)


def check_tokens(ids: Tensor, tokenizer: Any, rows: int, where: str) -> None:
    """MoeConvertError naming the first of `ids` (int64) that has no embedding, of which there are
    `rows`; `where` is the text's name.
    """
    beyond = ids[(ids < 0) | (ids >= rows)]
    if len(beyond):
        number = int(beyond[0])
        raise MoeConvertError(
            f"{where}: token {number} ({tokenizer.convert_ids_to_tokens(number)!r}) is beyond the model's {rows}"
            " embeddings: the tokenizer is another model's, or has tokens that were added to it alone",
            "leave the token out of the text, or give the model its own tokenizer",
        )


def embedding_rows(model: Any) -> int:
    """The number of tokens that a model of transformers has embeddings of."""
    return int(model.get_input_embeddings().weight.shape[0])
