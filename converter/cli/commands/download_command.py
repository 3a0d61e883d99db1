"""moe-convert download"""

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from converter.cli.options import shared_options
from converter.cli.options.early_checks import check_out_folder
from converter.cli.show.console import Output, gigabytes, output_options

_BESIDE = ("README.md", "quality.json")
"""Files of a converted folder that its index does not list."""


@click.command("download", epilog="Exit code 3 if anything is damaged.")
@click.argument("repo", metavar="OWNER/MODEL")
@click.option(
    "--local-dir",
    type=click.Path(path_type=Path),
    help="Where to put the files [default: the cache of the Hub].",
)
@click.option("--revision", help="Branch, tag or commit [default: main].")
@click.option(
    "--include",
    multiple=True,
    metavar="PATTERN",
    help="Only files that match, such as '*.json'; repeatable.",
)
@shared_options.token
@output_options(
    interrupted="run the same command again: files that are there are not fetched again"
)
def command(
    repo: str, local_dir: Path | None, include: tuple[str, ...], output: Output, **options: Any
) -> None:
    """Fetch the converted model OWNER/MODEL from the Hub, and check every byte of it.

    Fetched are the files that its index lists, README.md and quality.json; with --include, those
    that match. Files that are there already are not fetched again; an interrupted download goes on
    when it is run again.

    \b
    moe-convert download owner/my-mixtral-2bit
    moe-convert download owner/my-mixtral-2bit --local-dir my-mixtral-2bit
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
        mend = f"moe-convert repair {shlex.quote(str(folder))} --from {repo}" if local_dir else None
        problems = _against_index(folder, mend, output)
    n_bytes = sum(file.size for file in files)
    facts = {
        "repository": f"{source.repo}@{source.commit}",
        "folder": str(folder),
        "files": len(files),
        "bytes": n_bytes,
        "ok": not problems,
        "problems": problems,
    }
    text = f"{folder}\nok: {len(files)} files, {gigabytes(n_bytes)}, all read and compared"
    output.result(facts, "\n".join([*problems, f"{len(problems)} problems"]) if problems else text)
    if problems:
        sys.exit(3)


def _check_place(source: Any, local_dir: Path | None) -> None:
    """Refuses a place that cannot be written, before the first byte comes."""
    from formats.hub.repo import cache_root

    if not source.offline:
        place = local_dir or cache_root()
        check_out_folder(next(p for p in (place, *place.absolute().parents) if p.exists()))


def _fetch_matching(
    source: Any, patterns: list[str], local_dir: Path | None, output: Output
) -> tuple[Path, list[Any]]:
    """(folder, files) of what the user asked for by name, whatever it is."""
    from formats.errors import HubError
    from formats.hub.repo_listing import check_room

    files = source.matching(patterns)
    if not files:
        raise HubError(f"{source.repo}@{source.commit[:12]}: no file matches", "check --include")
    if not source.offline:
        check_room(source, files, local_dir)
    return source.snapshot(patterns, local_dir=local_dir, bars=not output.quiet), files


def _against_index(folder: Path, mend: str | None, output: Output) -> list[str]:
    """What is wrong with a converted folder, and the command that mends it; None in the cache,
    which stays as it is.
    """
    from formats.reading.verify import verify_folder

    progress = output.progress()
    report = verify_folder(
        folder, read_data=True, progress=lambda done, total: progress("verifying", done, total)
    )
    again = "delete the files that the damaged ones link to, and run the same command again"
    return (
        [*(problem.message for problem in report.problems), f"  next: {mend or again}"]
        if report.problems
        else []
    )


def _against_hub(folder: Path, files: list[Any], output: Output) -> list[str]:
    """Which of some files have another hash than the Hub says."""
    progress, done, total = output.progress(), 0, sum(file.size for file in files)
    problems = []
    for file in files:
        hasher = file.hasher()
        with open(folder / file.name, "rb") as f:
            while chunk := f.read(4 << 20):
                hasher.update(chunk)
        if hasher.hexdigest() != file.etag:
            problems.append(
                f"{folder / file.name}: its hash is not the Hub's, {file.etag}; delete it and run again"
            )
        done += file.size
        progress("verifying", done, total)
    return problems
