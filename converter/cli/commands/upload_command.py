"""`moe-convert upload`: publishes a converted folder on the Hub."""

import sys
from pathlib import Path
from typing import Any

import click

from converter.cli.show.console import Output, gigabytes, output_options


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
    help="Licence of the weights by its Hub id, such as apache-2.0. Required if the source has no"
    " licence file.",
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
    are not sent again. Your own README.md is kept; one that moe-convert wrote is updated.
    """
    facts, text = upload(path, repo, output, dry_run=dry_run, **options)
    output.result(facts, text)
    if not facts["ok"]:
        sys.exit(3)


def upload(
    path: Path, repo: str, output: Output, *, dry_run: bool = False, **options: Any
) -> tuple[dict[str, Any], str]:
    """Verify and publish. Return the facts for JSON and the same as text.

    `ok` is False if the folder is damaged; then nothing was sent.
    """
    from converter.publish.hub_commit import PublishOptions, check_publication, publish_folder
    from formats.reading.verify import verify_folder

    if options.get("create_pr") and options.get("revision"):
        raise click.UsageError("--create-pr opens a pull request against main: give no --revision")
    target = PublishOptions(repo, license=options.pop("license_id", None), **options)
    report = verify_folder(path)
    if not report.problems:
        # A refused publication must fail before minutes of reading.
        check_publication(path, target)
        report = verify_folder(path, read_data=True, progress=output.stage("verifying"))
    if report.problems:
        problems = [problem.message for problem in report.problems]
        lines = [
            *problems,
            f"{len(problems)} problems: nothing was sent",
            f"  next: {report.problems[0].hint}",
        ]
        return {"ok": False, "problems": problems}, "\n".join(lines)
    done = publish_folder(path, target, dry_run=dry_run, bars=not output.quiet)
    facts = {
        "ok": True,
        "repository": repo,
        "commit": done.commit,
        "url": done.url,
        "sent_files": done.sent,
        "sent_bytes": sum(done.sent.values()),
        "unchanged_files": done.unchanged,
        "deleted_files": done.deleted,
    }
    sizes = f"{len(done.sent)} files, {gigabytes(sum(done.sent.values()))}"
    what = f"would send {sizes}" if dry_run else f"sent {sizes}"
    lines = [f"{name}  {gigabytes(size)}" for name, size in done.sent.items()] if dry_run else []
    lines.append(f"{what}; {len(done.unchanged)} files unchanged, {len(done.deleted)} deleted")
    return facts, "\n".join([*lines, *([done.url] if done.url else [])])
