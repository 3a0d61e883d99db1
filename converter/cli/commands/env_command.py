"""`moe-convert env`: shows versions, kernels and GPUs."""

import importlib.metadata
import platform

import click

from converter import __version__
from converter.cli.show.console import Output, output_options
from converter.cli.show.tables import table

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
    """Show versions, the kernels and the solver in use with the reason, and the GPUs."""
    from converter.solvers.native import solver_library
    from loader.arithmetic import kernels
    from loader.cuda.device_choice import describe_gpus

    facts = {
        "moe-convert": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    facts |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    facts |= {
        "kernels": kernels.describe(),
        "solver": solver_library.describe(),
        "gpu": describe_gpus(),
    }
    output.result(facts, table([(name, value) for name, value in facts.items()], left=2))
