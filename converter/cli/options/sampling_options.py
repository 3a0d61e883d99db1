"""The options that say how tokens are chosen, and the settings that they make."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")

_OPTIONS = (
    click.option(
        "--temperature",
        type=click.FloatRange(min=0),
        help="Sample at this temperature; 0 or none is greedy.",
    ),
    click.option(
        "--top-p",
        type=click.FloatRange(0, 1, min_open=True),
        help="Sample among the likeliest tokens with this total probability.",
    ),
    click.option(
        "--top-k",
        type=click.IntRange(min=0),
        help="Sample among this many of the likeliest tokens; 0: all.",
    ),
    click.option(
        "--min-p",
        type=click.FloatRange(0, 1),
        help="Sample among the tokens with at least this share of the likeliest token's probability.",
    ),
    click.option(
        "--repetition-penalty",
        type=click.FloatRange(min=0, min_open=True),
        help="Divide the logits of tokens that came before by this; 1 is none.",
    ),
    click.option("--seed", type=int, help="Seed of the sampling."),
)


def with_sampling_options(function: F) -> F:
    """Add --temperature, --top-p, --top-k, --min-p, --repetition-penalty and --seed; the command
    gets each by name.
    """
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def settings_of(max_new_tokens: int, options: dict[str, Any]) -> Any:
    """Return the GenerationSettings of the options, which are taken out of `options`. RecipeError
    out of range.
    """
    from loader.serving.answers.settings import GenerationSettings

    return GenerationSettings(
        max_new_tokens=max_new_tokens, **{name: options.pop(name) for name in NAMES}
    )
