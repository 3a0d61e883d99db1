"""Options of sampling, and the settings they give."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")

_OPTIONS = (
    click.option(
        "--temperature",
        type=click.FloatRange(min=0),
        help="Sampling temperature; 0 is greedy [default: greedy].",
    ),
    click.option(
        "--top-p",
        type=click.FloatRange(0, 1, min_open=True),
        help="Sample from the most likely tokens with this total probability, 0 to 1.",
    ),
    click.option(
        "--top-k",
        type=click.IntRange(min=0),
        help="Sample from this many most likely tokens; 0 is all.",
    ),
    click.option(
        "--min-p",
        type=click.FloatRange(0, 1),
        help="Sample from tokens with at least this share of the top token's probability, 0 to 1.",
    ),
    click.option(
        "--repetition-penalty",
        type=click.FloatRange(min=0, min_open=True),
        help="Divide the logits of earlier tokens by this; 1 is no penalty.",
    ),
    click.option("--seed", type=int, metavar="N", help="Seed of the random numbers."),
)


def with_sampling_options(function: F) -> F:
    """Add --temperature, --top-p, --top-k, --min-p, --repetition-penalty and --seed."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def settings_of(max_new_tokens: int, options: dict[str, Any]) -> Any:
    """Remove the sampling options from `options` and return them as GenerationSettings.

    RecipeError if a value is out of range.
    """
    from loader.serving.answers.settings import GenerationSettings

    return GenerationSettings(
        max_new_tokens=max_new_tokens, **{name: options.pop(name) for name in NAMES}
    )
