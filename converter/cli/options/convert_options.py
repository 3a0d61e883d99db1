"""Options of `convert`: recipe, source, resources, publication."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from converter.cli.options import shared_options
from converter.solvers.registry import SOLVERS

F = TypeVar("F", bound=Callable[..., Any])

_RECIPE = (
    click.option(
        "--recipe",
        "recipe_name",
        metavar="NAME|FILE.json",
        default="2bit",
        show_default=True,
        help="Bits and solver: 2bit, 2bit-down3 (2 bits, down_proj 3), 3bit, 4bit, 16bit (not"
        " quantized), paper-2bit, paper-3bit, or a JSON file. 2bit-scalar and 3bit-scalar are the"
        " packings of 2bit and 3bit, and stay so when these names get others.",
    ),
    click.option(
        "-b",
        "--bits",
        "--expert-bits",
        "bits",
        type=int,
        metavar="BITS",
        help="Bits of expert weights: 2, 3, 4, or 16 (not quantized) [default: the recipe's].",
    ),
    click.option(
        "--attn-bits",
        type=int,
        metavar="BITS",
        help="Bits of attention weights: 4, or 16 (not quantized) [default: the recipe's].",
    ),
    click.option(
        "--head-bits",
        type=int,
        metavar="BITS",
        help="Bits of the output head: 4, or 16 (not quantized) [default: 16].",
    ),
    click.option(
        "--group-size",
        type=int,
        metavar="N",
        help="Weights that share a scale: 16, 32 or 64, if a packing has it"
        " [default: the recipe's].",
    ),
    click.option(
        "--gate-up",
        metavar="PACKING",
        help="Packing of the experts' gate_proj and up_proj [default: the recipe's].",
    ),
    click.option(
        "--down",
        metavar="PACKING",
        help="Packing of the experts' down_proj [default: the recipe's].",
    ),
    click.option(
        "--layer-bits",
        multiple=True,
        metavar="RULE,RULE",
        help="Bits of single layers or experts: 0-3=3bit (layers), 28-31/down=3bit (projection),"
        " 5:0-1=4bit (experts of layer 5). The last matching rule wins.",
    ),
    click.option(
        "--target-bpw",
        type=float,
        metavar="BITS",
        help="Mean bits per expert weight, such as 2.7. Calibration chooses the layers that get"
        " more bits than the recipe's.",
    ),
    click.option(
        "--solver",
        metavar="NAME",
        help=f"Rounding: {', '.join(f'{name} ({entry.help})' for name, entry in SOLVERS.items())}"
        " [default: feedback; hqq in the paper recipes].",
    ),
    click.option(
        "--calibrate",
        metavar="none|random|builtin|FILE",
        help="Calibration tokens: none, random, builtin (a text in the package) or a UTF-8 file"
        " [default: builtin with feedback, else none].",
    ),
    click.option(
        "--calibration-tokens",
        type=int,
        metavar="N",
        help="Number of calibration tokens [default: 8192].",
    ),
    click.option(
        "--down-width",
        metavar="COLUMNS|full",
        help="Columns of down_proj that compensate each other's errors, a multiple of 256. More is"
        " better and slower, and takes more memory [default: 256].",
    ),
    click.option(
        "--codec",
        type=click.Choice(["none", "zstd"]),
        default="none",
        show_default=True,
        help="Compression of each expert. zstd saves a few per cent.",
    ),
)
_SOURCE = (
    shared_options.adapters,
    shared_options.revision,
    shared_options.token,
    click.option(
        "--max-disk",
        metavar="SIZE",
        help="Maximum disk space for downloaded shards, such as 12GB [default: four shards].",
    ),
    click.option(
        "--no-keep",
        is_flag=True,
        help="Read the Hub's shards by HTTP ranges and store none. No hash can be checked then.",
    ),
)
_RESOURCES = (
    click.option(
        "--max-workers",
        type=click.IntRange(1),
        metavar="N",
        help="Number of threads [default: one per processor, if memory allows].",
    ),
    click.option(
        "--max-memory",
        metavar="SIZE",
        help="Memory limit of the process, such as 2GiB. It lowers the number of threads"
        " [default: what is free].",
    ),
    click.option(
        "--layers",
        "part",
        metavar="I/N",
        help="Convert only part I of N of the layers. Later runs convert the other parts.",
    ),
)
_PUBLICATION = (
    click.option(
        "--upload-repo",
        metavar="OWNER/MODEL",
        help="Publish the result in this repository, as `moe-convert upload` does.",
    ),
    click.option(
        "--private", is_flag=True, help="With --upload-repo: create a private repository."
    ),
    click.option(
        "--license",
        "license_id",
        metavar="ID",
        help="With --upload-repo: licence of the weights (see `moe-convert upload`).",
    ),
)
_RUN = (
    click.option(
        "--dry-run",
        is_flag=True,
        help="Check the conversion, print sizes, bits, memory and disk space, and write nothing.",
    ),
    click.option(
        "--no-resume",
        is_flag=True,
        help="Delete the files of an unfinished conversion in the output folder, and start anew.",
    ),
    click.option(
        "--force",
        is_flag=True,
        help="Write into a folder of another program, or replace a complete conversion. Only files"
        " of the same names are replaced. The source's folder is always refused.",
    ),
)


def with_convert_options(function: F) -> F:
    """Add the output folder and all options of a conversion."""
    out_dir = click.option(
        "-o",
        "--out-dir",
        type=click.Path(path_type=Path),
        metavar="FOLDER",
        help="Output folder [default: MODEL-RECIPE, or MODEL-ADAPTER-RECIPE].",
    )
    for option in reversed((out_dir, *_RECIPE, *_SOURCE, *_RESOURCES, *_PUBLICATION, *_RUN)):
        function = option(function)
    return function
