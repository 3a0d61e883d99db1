"""`moe-convert cache`: lists and removes what lies in HF_HOME/moe-convert."""

import time

import click

from converter.cli.show.console import Output, output_options
from converter.cli.show.tables import table
from formats.errors import MoeConvertError
from formats.sizes import format_size


@click.command(
    "cache",
    epilog="""\b
Examples:
  moe-convert cache
  moe-convert cache --remove owner/mixtral-2bit
  moe-convert cache --clear""",
)
@click.option(
    "--remove",
    multiple=True,
    metavar="OWNER/MODEL",
    help="Remove all commits of this model. Repeat the option for more models.",
)
@click.option("--clear", is_flag=True, help="Remove everything.")
@output_options(interrupted="run the same command again: it removes the rest")
def command(remove: tuple[str, ...], clear: bool, output: Output) -> None:
    """List what lies in HF_HOME/moe-convert, or remove it.

    The folder holds the models that were loaded with --lazy, and compiled GPU kernels. Models that
    were downloaded whole lie in huggingface_hub's cache: `hf cache` lists and removes those.
    """
    from formats.hub.hub_settings import kept_root
    from formats.hub.kept_models import kept_folders, remove_kept

    if remove and clear:
        raise click.UsageError("give --remove or --clear, not both")
    kept = kept_folders()
    names = {folder.name for folder in kept}
    if unknown := [name for name in remove if name not in names]:
        raise MoeConvertError(
            f"{kept_root()} has no model {unknown[0]}", "moe-convert cache  # list the models"
        )
    chosen = [folder for folder in kept if clear or folder.name in remove]
    for folder in chosen:
        remove_kept(folder)
    is_list = not (remove or clear)
    shown = kept if is_list else chosen
    facts = [
        {
            "name": folder.name,
            "commit": folder.commit,
            "path": str(folder.path),
            "bytes": folder.size_bytes,
            "state": folder.state,
        }
        for folder in shown
    ]
    total = sum(folder.size_bytes for folder in shown)
    rows = [
        (
            folder.name,
            folder.commit[:12],
            folder.state,
            time.strftime("%Y-%m-%d", time.localtime(folder.written_s)),
            format_size(folder.size_bytes),
        )
        for folder in shown
    ]
    summary = f"{format_size(total)} in {kept_root()}" if is_list else f"{format_size(total)} freed"
    lines = (
        [table([("model", "commit", "state", "written", "size"), *rows], left=4)] if rows else []
    )
    output.result(
        {"folder": str(kept_root()), "removed": not is_list, "bytes": total, "models": facts},
        "\n".join([*lines, summary]),
    )
