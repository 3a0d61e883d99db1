"""`moe-convert upload`: publishes a converted folder on the Hub."""

import sys
from pathlib import Path
from typing import Any

import click

from converter.cli.show.console import Output, output_options
from converter.cli.steps.publication import upload


@click.command(
    "upload",
    epilog="""\b
Examples:
  moe-convert upload ./my-mixtral-2bit owner/my-mixtral-2bit --private
  moe-convert upload ./my-mixtral-2bit owner/my-mixtral-2bit --dry-run

Exit code 3 if the folder is damaged: then nothing is sent.""",
)
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("repo", metavar="OWNER/MODEL")
@click.option("--private", is_flag=True, help="Create a private repository.")
@click.option(
    "--create-pr", is_flag=True, help="Open a pull request instead of a commit on the branch."
)
@click.option(
    "--revision",
    metavar="BRANCH",
    help="Branch to write to; it is created if it does not exist [default: main].",
)
@click.option(
    "--license",
    "license_id",
    metavar="ID",
    help="Licence of the weights by its Hub id, such as apache-2.0, or unknown. Required if the"
    " source has no licence file and its model card names none.",
)
@click.option(
    "--base-model",
    metavar="OWNER/MODEL",
    help="Model that was converted, if the source was a local folder.",
)
@click.option(
    "--token",
    help="Access token with write permission [default: the token of `hf auth login`, or HF_TOKEN].",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check the folder and the model card, list what would be sent, and send nothing.",
)
@output_options(interrupted="run the same command again: uploaded files are not sent again")
def command(path: Path, repo: str, dry_run: bool, output: Output, **options: Any) -> None:
    """Verify the converted folder PATH and publish it on the Hub as OWNER/MODEL.

    One commit publishes the whole model with a model card. Files that the repository already has
    are not sent again. Text and metadata that you wrote into the README.md, here or on the Hub, are
    kept; the lines that moe-convert wrote are updated.
    """
    facts, text = upload(path, repo, output, dry_run=dry_run, **options)
    output.result(facts, text)
    if not facts["ok"]:
        sys.exit(3)
