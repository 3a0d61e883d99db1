"""Compares a model with its original, after a check that both fit together."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from converter import __version__
from converter.checkpoint.adapters.adapter_folder import AdapterFolder, other_adapters
from converter.checkpoint.source import Checkpoint
from converter.checkpoint.source_tokenizer import open_source_tokenizer
from converter.cli.show.console import Output
from converter.cli.steps.convert_source import open_adapters
from converter.forward.streamed_model import StreamedModel
from formats.artifact import Artifact
from formats.errors import MoeConvertError
from formats.index import Architecture, Index
from formats.progress import Progress
from formats.quality import Evaluation
from formats.unconverted import check_finished

if TYPE_CHECKING:
    from formats.prediction import Prediction
    from loader.evaluation.comparison import Text

_log = logging.getLogger(__name__)
_TOKENIZER_HINT = "give the checkpoint that was converted, with its own tokenizer"


def compare_with_original(
    path: Path,
    against: Path,
    adapters: Sequence[str],
    named: list[tuple[str, str]],
    load: Callable[[Path], Any],
    *,
    window: int,
    batch: int,
    max_windows: int | None,
    versions: dict[str, str],
    check: str,
    output: Output,
    progress: Progress,
) -> Evaluation:
    """Compare the model in `path` with the checkpoint in `against` on (name, text) pairs.

    adapters: names of those to merge into `against`. A checkpoint is computed layer by layer.
    `load` loads a converted folder after the original is done, so that its cache can use the
    memory. Raises SourceError, FormatError and MoeConvertError, as docs/quality.md describes.
    """
    import transformers

    from formats.unconverted import is_converted
    from loader.evaluation.comparison import compare, model_predictions

    check_finished(against)
    with ExitStack() as opened:
        merged = open_adapters(adapters, None)
        original = opened.enter_context(Checkpoint(against, merged))
        converted = is_converted(path)
        ours: Any = Artifact.open(path) if converted else opened.enter_context(Checkpoint(path))
        _check_alike(original.architecture, against, ours.architecture, path)
        if converted:
            _warn_of_other_adapters(ours.index, merged, path)
        texts = _texts(
            path, original, named, window, max_windows, ours.architecture.vocab_size, check
        )
        windows = torch.cat([text.windows for text in texts])

        def streamed(checkpoint: Checkpoint) -> "Iterator[Prediction]":
            model = StreamedModel(checkpoint, windows)
            model.run(
                lambda done, total: output.note(f"{checkpoint.name}: layer {done} of {total}")
            )
            return model.predictions()

        of_original = streamed(original)
        of_model = model_predictions(load(path), windows, batch) if converted else streamed(ours)
        results, overall = compare(of_original, of_model, texts, progress)
    return Evaluation(
        original=original.name,
        window=window,
        versions={
            "moe-convert": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            **versions,
        },
        texts=results,
        overall=overall,
    )


def _check_alike(original: Architecture, against: Path, ours: Architecture, path: Path) -> None:
    # The number of experts per token may differ: its effect may be what the user measures.
    for name in Architecture.__struct_fields__:
        theirs, our = getattr(original, name), getattr(ours, name)
        if theirs != our and name != "num_experts_per_tok":
            raise MoeConvertError(
                f"{against}: {name} is {theirs}, but in {path} it is {our}",
                "give the checkpoint that was converted: --against ORIGINAL",
            )


def _warn_of_other_adapters(index: Index, adapters: Sequence[AdapterFolder], path: Path) -> None:
    # No error: ORIGINAL may be a checkpoint into which PEFT merged the adapters.
    if difference := other_adapters(index.source.adapters, adapters):
        _log.warning("%s: %s; if ORIGINAL is the base model, use %s", path, *difference)


def _texts(
    path: Path,
    original: Checkpoint,
    named: list[tuple[str, str]],
    window: int,
    max_windows: int | None,
    rows: int,
    check: str,
) -> "list[Text]":
    """Return the windows of the texts. MoeConvertError if the two tokenizers disagree."""
    import loader
    from loader.evaluation.comparison import Text
    from loader.evaluation.perplexity import named_windows
    from loader.hf.loading.tokenizer import check_tokens

    against = original.tokenizer_folder
    if against == original.folder:
        their_tokenizer = loader.load_tokenizer(against, check=check)
    else:
        their_tokenizer = open_source_tokenizer(original)
    tokenizers = [their_tokenizer, loader.load_tokenizer(path, check=check)]
    texts = []
    for name, text in named:
        theirs, ours = (named_windows(t, name, text, window, max_windows) for t in tokenizers)
        check_tokens(ours, tokenizers[1], rows, name)
        short = min(theirs.numel(), ours.numel())
        differ = (theirs.flatten()[:short] != ours.flatten()[:short]).nonzero()
        if len(differ):
            place = int(differ[0])
            their_token = int(theirs.flatten()[place])
            our_token = int(ours.flatten()[place])
            raise MoeConvertError(
                f"{name}: token {place} is {their_token} with the tokenizer in {against} and"
                f" {our_token} with the one in {path}",
                _TOKENIZER_HINT,
            )
        if theirs.shape != ours.shape:
            raise MoeConvertError(
                f"{name}: {len(theirs)} windows with the tokenizer in {against},"
                f" {len(ours)} with the one in {path}",
                _TOKENIZER_HINT,
            )
        texts.append(Text(name, hashlib.sha256(text.encode()).hexdigest(), ours))
    return texts
