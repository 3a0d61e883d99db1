"""The option --plot: a drawing of the result."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from converter.cli.options.early_checks import check_out_file, require_extra
from formats.install import install_extra

F = TypeVar("F", bound=Callable[..., Any])

_SUFFIXES = (".svg", ".png")


def with_plot_option(what: str) -> Callable[[F], F]:
    """Return the option --plot, which draws `what`."""
    return click.option(
        "--plot",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE.svg|png",
        help=f"Plot {what} ({install_extra('plots')}).",
    )


def check_plot(path: Path | None, inputs: Sequence[Path]) -> None:
    """Raise before the work what would keep --plot from being written. inputs: files to keep."""
    from formats.files.overlap import refuse_inputs

    if path is None:
        return
    if path.suffix not in _SUFFIXES:
        raise click.UsageError(f"--plot {path}: the name must end in {' or '.join(_SUFFIXES)}")
    refuse_inputs([path], list(inputs))
    check_out_file(path)
    require_extra("matplotlib", "plots", "--plot")
