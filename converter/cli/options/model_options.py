"""Options of every command that loads a model and generates with it."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from converter.cli.options import shared_options

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    shared_options.device,
    shared_options.gpu_cache,
    shared_options.ram_cache,
    shared_options.io,
    shared_options.policy,
    click.option(
        "--prefetch",
        type=click.Choice(["auto", "0", "1", "2"]),
        default="auto",
        show_default=True,
        help="Experts of the next layer to predict and read ahead. auto: as many as a token uses.",
    ),
    click.option("--no-prefetch", is_flag=True, help="Same as --prefetch 0."),
    click.option(
        "--cpu-share",
        type=click.Choice(["off", "auto"]),
        default="off",
        show_default=True,
        help="With a GPU. auto: compute a missed expert on the CPU if that is faster than copying"
        " it to the GPU.",
    ),
    shared_options.check,
    click.option(
        "--trace",
        type=shared_options.FILE,
        metavar="FILE",
        help="Routing trace (see `moe-convert trace`). --ram-cache is divided among the layers so"
        " that this trace reads least, instead of evenly.",
    ),
    shared_options.kernels,
    shared_options.kv_bits,
    click.option(
        "--lazy",
        is_flag=True,
        help="With a Hub repository: start before all experts are downloaded.",
    ),
    shared_options.revision,
    shared_options.token,
)


def with_model_options(function: F) -> F:
    """Add the options of memory, reading and origin. The command passes them as a dict to
    `steps.model_loading.load_model`.
    """
    for option in reversed(_OPTIONS):
        function = option(function)
    return function
