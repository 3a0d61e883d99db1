"""`moe-convert env`: shows versions, kernels and GPUs."""

import importlib.metadata
import platform
import re
from pathlib import Path

import click

import converter
from converter import __version__
from converter.cli.show.console import Output, output_options
from converter.cli.show.tables import table
from formats import install

_PACKAGES = (
    "torch",
    "transformers",
    "hqq",
    "safetensors",
    "huggingface-hub",
    "numpy",
    "zstandard",
    "msgspec",
)


@click.command(
    "env",
    epilog="""\b
Examples:
  moe-convert env
  moe-convert env --json""",
)
@output_options(interrupted="nothing was changed")
def command(output: Output) -> None:
    """Show versions, the kernels and the solver in use, and the GPUs.

    \b
    kernels    code that multiplies packed weights, native or torch
    solver     code that quantizes, native or torch
    wheel      tag of the installed wheel; py3-none-any has no native libraries
    reinstall  command that installs moe-convert again, without torch

    For native code, the line names the instruction set and the library. For torch, it has the
    reason, and the command that builds the native library.
    """
    from converter.solvers.native import solver_library
    from loader.arithmetic import kernels
    from loader.cuda.device_choice import describe_gpus

    facts = {
        "moe-convert": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    facts |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    solver = solver_library.describe()
    facts |= {
        "folder": str(Path(converter.__file__).parents[1]),
        "wheel": _wheel_tags(),
        "kernels": kernels.describe(),
        "solver": solver if solver_library.available() else f"torch (slow): {solver}",
        "gpu": describe_gpus(),
        "reinstall": install.reinstall(),
    }
    output.result(facts, table([(name, value) for name, value in facts.items()], left=2))


def _wheel_tags() -> str:
    """Return the tags of the installed wheel, separated by spaces."""
    try:
        text = importlib.metadata.distribution(install.PACKAGE).read_text("WHEEL") or ""
    except importlib.metadata.PackageNotFoundError:
        return "none: not installed by pip"
    return " ".join(re.findall(r"^Tag: (\S+)$", text, re.M)) or "unknown"
