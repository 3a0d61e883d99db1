"""Checks before long work, so that a missing package or a wrong path fails at once."""

import tempfile
from importlib.util import find_spec
from pathlib import Path

import click

from formats.errors import MoeConvertError, OutputError
from formats.install import install_extra


def check_out_file(path: Path) -> None:
    """Raise OutputError unless a file can be written as `path`. Leaves nothing behind."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder", "name a file")
    check_out_folder(path.absolute().parent)


def check_out_folder(folder: Path) -> None:
    """Raise OutputError unless files can be written in `folder`. Leaves nothing behind."""
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "is not there"
        raise OutputError(f"{folder} {what}", "choose a folder that is there")
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".moe-convert.probe-"):
            pass
    except OSError as e:
        raise OutputError(
            f"{folder}: cannot be written to: {e.strerror}", "choose another folder"
        ) from None


def require_extra(module: str, extra: str, option: str) -> None:
    """Raise MoeConvertError, with the install command of `extra`, unless `module` is installed."""
    if find_spec(module) is None:
        raise MoeConvertError(f"{option} needs the package {module}", install_extra(extra))


def given_options() -> list[str]:
    """Return the parameter names of the present command that its command line gives."""
    context = click.get_current_context()
    typed = click.core.ParameterSource.COMMANDLINE
    return [name for name in context.params if context.get_parameter_source(name) is typed]
