import math
from types import SimpleNamespace

import pytest
import torch
from measured_texts import measure_perplexity

from formats.errors import MoeConvertError
from loader.evaluation.perplexity import (
    PerplexityReport,
    TextPerplexity,
    read_text,
    windows_of,
)


class LetterTokenizer:
    """One token a letter, a = 1; BOS is 0."""

    bos_token_id = 0

    def __call__(self, text, add_special_tokens, verbose):
        assert not add_special_tokens
        return {"input_ids": [ord(letter) - ord("a") + 1 for letter in text]}


class SuccessorModel:
    """Gives the next letter probability 1/2, and the other 31 tokens the rest in equal shares."""

    device = torch.device("cpu")

    def __init__(self):
        self.batches = []

    def get_input_embeddings(self):
        return torch.nn.Embedding(32, 1)

    def __call__(self, input_ids, use_cache):
        self.batches.append(tuple(input_ids.shape))
        logits = torch.zeros(*input_ids.shape, 32, dtype=torch.float64)
        logits.scatter_(2, (input_ids + 1)[..., None], math.log(31))
        return SimpleNamespace(logits=logits)


def test_windows_begin_with_bos_do_not_overlap_and_drop_the_rest():
    assert windows_of(LetterTokenizer(), "abcdefgh", 4).tolist() == [[0, 1, 2, 3], [0, 4, 5, 6]]
    assert windows_of(LetterTokenizer(), "abcdefgh", 4, max_windows=1).tolist() == [[0, 1, 2, 3]]


def test_every_token_but_bos_is_scored():
    report = measure_perplexity(
        SuccessorModel(), LetterTokenizer(), [("t", "abcabcxyz")], window=4, batch=2
    )
    # abc: 3 of 3 follow their predecessor (a follows BOS); abc again; xyz: x does not.
    expected = 8 * math.log(2) + math.log(62)
    assert report.texts[0].tokens == 9
    assert report.texts[0].nll == pytest.approx(expected, rel=1e-6)
    assert report.texts[0].perplexity == pytest.approx(math.exp(expected / 9), rel=1e-6)


def test_overall_is_the_mean_over_tokens_not_over_texts():
    report = PerplexityReport(
        4, (TextPerplexity("a", 1, math.log(2)), TextPerplexity("b", 3, 3 * math.log(4)))
    )
    assert report.overall.perplexity == pytest.approx(2 ** (7 / 4))
    assert report.as_dict()["overall"]["tokens"] == 4


@pytest.mark.parametrize("batch", [1, 2, 3, 100])
def test_the_batch_does_not_change_the_result(batch):
    model = SuccessorModel()
    report = measure_perplexity(
        model, LetterTokenizer(), [("t", "abcabdabeabf")], window=4, batch=batch
    )
    assert report.texts[0].nll == pytest.approx(9 * math.log(2) + 3 * math.log(62), rel=1e-6)
    assert max(shape[0] for shape in model.batches) <= batch


def test_progress_counts_windows():
    seen = []
    measure_perplexity(
        SuccessorModel(),
        LetterTokenizer(),
        [("t", "abcabcabc")],
        window=4,
        batch=2,
        progress=lambda *a: seen.append(a),
    )
    assert seen == [("t", 2, 3), ("t", 3, 3)]


def test_a_text_shorter_than_a_window_is_named():
    with pytest.raises(MoeConvertError, match=r"tiny\.txt"):
        measure_perplexity(SuccessorModel(), LetterTokenizer(), [("tiny.txt", "ab")], window=4)


def test_a_tokenizer_without_bos_is_refused():
    tokenizer = LetterTokenizer()
    tokenizer.bos_token_id = None
    with pytest.raises(MoeConvertError, match="BOS"):
        windows_of(tokenizer, "abc", 4)


def test_line_ends_are_read_as_they_are(tmp_path):
    (tmp_path / "t").write_bytes(b"a\r\nb")
    assert read_text(tmp_path / "t") == "a\r\nb"


def test_a_text_that_is_not_utf8_is_refused_with_the_place(tmp_path):
    (tmp_path / "t").write_bytes(b"abc\xff")
    with pytest.raises(MoeConvertError, match="byte 3"):
        read_text(tmp_path / "t")
