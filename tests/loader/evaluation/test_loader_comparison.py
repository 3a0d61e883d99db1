"""The measures of a comparison, on predictions computed by hand."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from formats.errors import MoeConvertError
from formats.prediction import Prediction
from loader.evaluation import comparison
from loader.evaluation.comparison import Text, compare

ROUTERS = torch.tensor([[[0, 1], [2, 3], [4, 5], [6, 7]]] * 2)  # [2 layers, 4 positions, 2]


def uniform(begin: int, end: int) -> Tensor:
    return torch.zeros(end - begin, 4)


def peaked(begin: int, end: int) -> Tensor:
    """Token 1 has probability 1/2, the other three share the rest."""
    return torch.tensor([0, math.log(3), 0, 0]).expand(end - begin, 4)


def predictions(
    logits: Callable[[int, int], Tensor], windows: int, routers: Tensor = ROUTERS
) -> Iterator[Prediction]:
    return iter([Prediction(logits, routers)] * windows)


def text(*windows: list[int], name: str = "t") -> Text:
    return Text(name, "0" * 64, torch.tensor(windows))


def test_kl_perplexities_and_agreement_are_as_computed_by_hand() -> None:
    (of_text,), overall = compare(
        predictions(peaked, 1), predictions(uniform, 1), [text([0, 1, 1, 2])]
    )
    # KL of (1/2, three times 1/6) from uniform; likelihoods 1/2, 1/2, 1/6 against three times 1/4.
    assert of_text.kl == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(4 / 6), rel=1e-5)
    assert of_text.original_perplexity == pytest.approx(24 ** (1 / 3), rel=1e-6)
    assert of_text.perplexity == pytest.approx(4, rel=1e-6)
    assert of_text.ratio == pytest.approx(4 / 24 ** (1 / 3), rel=1e-6)
    assert of_text.agreement == 0
    assert (of_text.tokens, of_text.windows, of_text.sha256, overall.sha256) == (
        3,
        1,
        "0" * 64,
        None,
    )


def test_standard_errors_are_over_windows_and_none_of_one() -> None:
    (one, two), overall = compare(
        predictions(peaked, 3),
        predictions(uniform, 3),
        [text([0, 1, 1]), text([0, 1, 1], [0, 2, 2])],
    )
    assert one.ratio_error is None and one.kl_error is None
    # Log ratios of the windows: log 4 - log 2, and log 4 - log 6: they differ by log 3.
    assert two.ratio_error == pytest.approx(math.log(3) / 2, rel=1e-6)
    assert two.kl_error == pytest.approx(0, abs=1e-7)
    assert overall.windows == 3 and overall.tokens == 6
    assert overall.ratio == pytest.approx((2 * 2 * 4 / 6) ** (1 / 3), rel=1e-6)


def test_routers_agree_where_the_sets_are_the_same_whatever_the_order() -> None:
    other = ROUTERS.clone()
    other[0, 0] = torch.tensor([1, 0])
    other[1, 1] = torch.tensor([2, 4])
    _, overall = compare(
        predictions(uniform, 1), predictions(uniform, 1, other), [text([0, 1, 1, 2])]
    )
    assert overall.routers == [1.0, 0.75]


def test_a_piece_of_positions_at_a_time_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def logits(begin: int, end: int) -> Tensor:
        asked.append((begin, end))
        return torch.randn(9, 4, generator=torch.Generator().manual_seed(1))[begin:end]

    whole = compare(
        predictions(uniform, 1), predictions(logits, 1), [text([0, 1, 2, 3, 0, 1, 2, 3, 0])]
    )[1]
    monkeypatch.setattr(comparison, "POSITIONS_AT_ONCE", 3)
    pieces = compare(
        predictions(uniform, 1), predictions(logits, 1), [text([0, 1, 2, 3, 0, 1, 2, 3, 0])]
    )[1]
    assert asked == [(0, 8), (0, 3), (3, 6), (6, 8)]
    assert pieces.kl == pytest.approx(whole.kl, rel=1e-6)
    assert pieces.perplexity == pytest.approx(whole.perplexity, rel=1e-6)


def test_a_prediction_that_is_not_a_number_names_text_and_window() -> None:
    def broken(begin: int, end: int) -> Tensor:
        return torch.full((end - begin, 4), math.nan)

    ours = iter([Prediction(uniform, ROUTERS), Prediction(broken, ROUTERS)])
    with pytest.raises(MoeConvertError, match=r"t, window 1: .* infinite or NaN"):
        compare(predictions(uniform, 2), ours, [text([0, 1, 1], [0, 2, 2])])


def test_routers_that_choose_more_experts_are_compared_by_their_first_ones() -> None:
    third = torch.full((2, 4, 1), 9)
    more = torch.cat([ROUTERS, third], -1)
    different = torch.cat([ROUTERS[..., :1], third, ROUTERS[..., 1:]], -1)
    for routers, share in ((more, 1.0), (different, 0.0)):
        _, overall = compare(
            predictions(uniform, 1), predictions(uniform, 1, routers=routers), [text([0, 1, 1, 2])]
        )
        assert overall.routers == [share, share]
