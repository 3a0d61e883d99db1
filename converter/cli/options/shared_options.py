"""Options that several commands have; each is defined once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from formats.checksums import CHECKS
from formats.install import install_extra
from formats.sizes import parse_size

Decorator = Callable[[Any], Any]

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)

revision = click.option(
    "--revision",
    metavar="NAME",
    help="Branch, tag or commit of the Hub repository [default: main].",
)
token = click.option(
    "--token",
    help="Access token for gated and private repositories [default: the token of `hf auth login`,"
    " or HF_TOKEN].",
)
adapters = click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="FOLDER|OWNER/NAME[@REVISION]",
    help="LoRA adapter to merge into the checkpoint's weights. Repeat the option for more adapters;"
    f" they are merged in order. Needs peft: {install_extra('adapters')}.",
)
ram_cache = click.option(
    "--ram-cache",
    default="auto",
    show_default=True,
    metavar="SIZE",
    help="RAM for the expert cache, such as 6GiB. auto: what the machine has free.",
)
device = click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="Device: cpu, cuda, cuda:1, or several GPUs as cuda:0,cuda:1. auto: a GPU if one works,"
    " else the CPU.",
)
gpu_cache = click.option(
    "--gpu-cache",
    default="auto",
    show_default=True,
    metavar="SIZE",
    help="GPU memory for the expert cache, such as 8GiB. auto: what the GPU has free.",
)
io = click.option(
    "--io",
    type=click.Choice(["auto", "mmap", "direct"]),
    default="auto",
    show_default=True,
    help="How experts are read: mmap uses the page cache, direct uses O_DIRECT. auto: mmap if all"
    " experts fit in --ram-cache, else direct.",
)
check = click.option(
    "--check",
    type=click.Choice(CHECKS),
    default="fast",
    show_default=True,
    help="Integrity check while reading. fast: sha256 of trunk and tokenizer, a quick checksum of"
    " each expert. sha256: sha256 of everything. none: no check.",
)
kernels = click.option(
    "--kernels",
    type=click.Choice(["auto", "native", "torch"]),
    default="auto",
    show_default=True,
    help="CPU kernels: native is the compiled library, torch is the slow reference. auto: native"
    " if it loads.",
)
kv_bits = click.option(
    "--kv-bits",
    type=click.Choice(["8", "16"]),
    default="16",
    show_default=True,
    callback=lambda _context, _option, value: int(value),
    help="Bits of a number in the KV cache. 16: the model's dtype. 8: about half the memory, on the"
    " CPU, for model types with a decoder.",
)
window = click.option(
    "--window",
    type=click.IntRange(min=2),
    default=256,
    show_default=True,
    metavar="TOKENS",
    help="Length of a window in tokens, BOS included.",
)
batch = click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    metavar="N",
    help="Windows computed at the same time.",
)
texts = click.option(
    "--text",
    "texts",
    type=FILE,
    multiple=True,
    metavar="FILE",
    help="A UTF-8 text. Repeat the option for more texts.",
)
raw = click.option(
    "--raw",
    is_flag=True,
    help="Do not apply the tokenizer's chat template.",
)
template = click.option(
    "--template",
    type=FILE,
    metavar="FILE",
    help="Chat template (Jinja) to use instead of the tokenizer's.",
)
policy = click.option(
    "--policy",
    type=click.Choice(["lrfu", "lru", "lfu"]),
    default="lrfu",
    show_default=True,
    help="Eviction policy of the expert cache.",
)


def max_new_tokens(default: int) -> Decorator:
    """Return the option --max-new-tokens."""
    return click.option(
        "--max-new-tokens",
        type=click.IntRange(min=1),
        default=default,
        show_default=True,
        metavar="TOKENS",
        help="Maximum length of an answer, in tokens.",
    )


def max_context(minimum: int, default: str) -> Decorator:
    """Return the option --max-context; `default` describes its default."""
    return click.option(
        "--max-context",
        type=click.IntRange(min=minimum),
        metavar="TOKENS",
        help=f"Maximum length of a prompt with its answer, in tokens [default: {default}].",
    )


def prefix_cache(default: str, text: str) -> Decorator:
    """Return the option --prefix-cache. Its value is bytes; 0 is allowed."""

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
