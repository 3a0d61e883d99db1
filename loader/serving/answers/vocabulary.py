"""The tokens of a model: their number, their text, and those that end an answer."""

from collections.abc import Iterable
from typing import Any

from loader.hf.loading.tokenizer import embedding_rows
from loader.serving.answers.generation import end_tokens


class Vocabulary:
    """The tokens of one model. size: number of logits."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.size = int(getattr(model.config, "vocab_size", 0) or embedding_rows(model))
        self.end_tokens = end_tokens(model, tokenizer)
        added = tokenizer.added_tokens_decoder
        special = {number for number, token in added.items() if token.special}
        self._hidden = frozenset(special | set(tokenizer.all_special_ids)) | self.end_tokens

    def text(self, token: int) -> str:
        """Return the text of one token alone, special tokens included."""
        return str(
            self._tokenizer.decode(
                [token], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def decoder(self, markers: Iterable[int] = ()) -> "Decoder":
        """Return a decoder that hides special tokens, except `markers`."""
        return Decoder(self._tokenizer, self._hidden - set(markers))

    def markers(self, texts: Iterable[str]) -> frozenset[int]:
        """Return the tokens whose whole text is one of `texts`."""
        known = self._tokenizer.get_vocab()
        return frozenset(known[text] for text in texts if text in known)


class Decoder:
    """Decodes tokens without those in `hidden`. It has the one tokenizer method that `TextStream`
    calls.
    """

    def __init__(self, tokenizer: Any, hidden: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """Return the text of `ids`. skip_special_tokens is ignored: `hidden` decides."""
        shown = [token for token in ids if token not in self._hidden]
        return str(
            self._tokenizer.decode(
                shown, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )
