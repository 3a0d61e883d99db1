"""`moe-convert download`: downloads a converted model and checks every byte."""

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from converter.cli.options import shared_options
from converter.cli.options.early_checks import check_out_folder
from converter.cli.show.console import Output, output_options
from formats.sizes import format_size

_BESIDE = ("README.md", "quality.json")
"""Files of a converted folder that the index does not list."""


@click.command(
    "download",
    epilog="""\b
Examples:
  moe-convert download owner/my-mixtral-2bit
  moe-convert download owner/my-mixtral-2bit --local-dir my-mixtral-2bit

Exit code 3 if anything is damaged.""",
)
@click.argument("repo", metavar="OWNER/MODEL")
@click.option(
    "--local-dir",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Folder for the files [default: huggingface_hub's cache].",
)
@shared_options.revision
@click.option(
    "--include",
    multiple=True,
    metavar="PATTERN",
    help="Download only matching files, such as '*.json'. Repeat the option for more patterns.",
)
@shared_options.token
@output_options(interrupted="run the same command again: complete files are not downloaded again")
def command(
    repo: str, local_dir: Path | None, include: tuple[str, ...], output: Output, **options: Any
) -> None:
    """Download the converted model OWNER/MODEL from the Hub and check every byte.

    The command downloads the files that the index lists, README.md and quality.json, or with
    --include the matching files. Complete files are not downloaded again. After an interruption,
    run the same command again: it resumes.
    """
    from formats.hub.repo import HubRepo
    from formats.hub.repo_listing import fetch_listed, note_unlisted

    source = HubRepo.open(repo, options["revision"], options["token"])
    _check_place(source, local_dir)
    if include:
        folder, files = _fetch_matching(source, list(include), local_dir, output)
        problems = _against_hub(folder, files, output)
    else:
        folder, files = fetch_listed(
            source, beside=_BESIDE, local_dir=local_dir, bars=not output.quiet
        )
        note_unlisted(source, [file.name for file in files])
        repair = (
            f"moe-convert repair {shlex.quote(str(folder))} --from {repo}" if local_dir else None
        )
        problems = _against_index(folder, repair, output)
    n_bytes = sum(file.size for file in files)
    facts = {
        "repository": f"{source.repo}@{source.commit}",
        "folder": str(folder),
        "files": len(files),
        "bytes": n_bytes,
        "ok": not problems,
        "problems": problems,
    }
    text = f"{folder}\nok: {len(files)} files, {format_size(n_bytes)}, all read and compared"
    output.result(facts, "\n".join([*problems, f"{len(problems)} problems"]) if problems else text)
    if problems:
        sys.exit(3)


def _check_place(source: Any, local_dir: Path | None) -> None:
    """Raise OutputError before the download if the target cannot be written."""
    from formats.hub.hub_settings import cache_root

    if not source.offline:
        place = local_dir or cache_root()
        check_out_folder(next(p for p in (place, *place.absolute().parents) if p.exists()))


def _fetch_matching(
    source: Any, patterns: list[str], local_dir: Path | None, output: Output
) -> tuple[Path, list[Any]]:
    """Download the files that match. Return their folder and the files."""
    from formats.errors import HubError
    from formats.hub.repo_listing import check_space

    files = source.matching(patterns)
    if not files:
        raise HubError(f"{source.repo}@{source.commit[:12]}: no file matches", "check --include")
    if not source.offline:
        check_space(source, files, local_dir)
    return source.snapshot(patterns, local_dir=local_dir, bars=not output.quiet), files


def _against_index(folder: Path, repair: str | None, output: Output) -> list[str]:
    """Return the problems of a converted folder, followed by the next step.

    repair: the command that repairs it, or None for a folder in the cache, which is never changed.
    """
    from formats.reading.verify import verify_folder

    report = verify_folder(folder, read_data=True, progress=output.progress())
    again = "delete the files that the damaged links point to, and run the same command again"
    return (
        [*(problem.message for problem in report.problems), f"  next: {repair or again}"]
        if report.problems
        else []
    )


def _against_hub(folder: Path, files: list[Any], output: Output) -> list[str]:
    """Return a problem for each file whose hash differs from the Hub's."""
    progress = output.progress()
    total = sum(file.size for file in files)
    done = 0
    problems = []
    for file in files:
        hasher = file.hasher()
        with open(folder / file.name, "rb") as f:
            while chunk := f.read(4 << 20):
                hasher.update(chunk)
        if hasher.hexdigest() != file.etag:
            problems.append(
                f"{folder / file.name}: the hash differs from the Hub's, {file.etag};"
                " delete the file and run the same command again"
            )
        done += file.size
        progress("verifying", done, total)
    return problems
