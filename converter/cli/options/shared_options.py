"""Options that several commands have, each said once."""

from collections.abc import Callable
from typing import Any

import click

from formats.checksums import CHECKS
from formats.sizes import parse_size

revision = click.option(
    "--revision", help="Branch, tag or commit of the Hub repository [default: main]."
)
token = click.option(
    "--token",
    help="For gated and private repositories [default: the one of hf auth login, or HF_TOKEN].",
)
ram_cache = click.option(
    "--ram-cache",
    default="auto",
    show_default=True,
    metavar="SIZE",
    help="Memory for experts, e.g. 6GiB.",
)
device = click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="cpu, cuda, cuda:1, or several GPUs as cuda:0,cuda:1; auto: a GPU if there is one that works.",
)
gpu_cache = click.option(
    "--gpu-cache",
    default="auto",
    show_default=True,
    metavar="SIZE",
    help="GPU memory for experts, e.g. 8GiB.",
)
io = click.option(
    "--io",
    type=click.Choice(["auto", "mmap", "direct"]),
    default="auto",
    show_default=True,
    help="How to read experts.",
)
check = click.option(
    "--check",
    type=click.Choice(CHECKS),
    default="fast",
    show_default=True,
    help="What is compared with the index as bytes are read: fast, the trunk's and tokenizer's sha256 and a quick"
    " checksum of each expert; sha256, also of the experts; or none.",
)
kernels = click.option(
    "--kernels", type=click.Choice(["auto", "native", "torch"]), default="auto", show_default=True
)
window = click.option(
    "--window",
    type=click.IntRange(min=2),
    default=256,
    show_default=True,
    help="Tokens a window, BOS included.",
)
raw = click.option(
    "--raw",
    is_flag=True,
    help="Leave prompts as they are, also where the tokenizer has a chat template.",
)


def prefix_cache(default: str, text: str) -> Callable[[Any], Any]:
    """Return the option --prefix-cache, whose value is bytes; 0 is a size too."""

    def parsed(_context: click.Context, _option: click.Parameter, value: str) -> int:
        return 0 if value == "0" else parse_size(value, "--prefix-cache")

    return click.option(
        "--prefix-cache",
        metavar="SIZE",
        default=default,
        show_default=True,
        callback=parsed,
        help=text,
    )
