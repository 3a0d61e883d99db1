"""moe-convert download"""

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from converter.cli import shared_options
from converter.cli.checks import check_out_folder
from converter.cli.output import Output, gigabytes, output_options


@click.command("download", epilog="Exit code 3 if anything is damaged.")
@click.argument("repo", metavar="OWNER/MODEL")
@click.option(
    "--local-dir", type=click.Path(path_type=Path), help="Where to put the files [default: the cache of the Hub]."
)
@click.option("--revision", help="Branch, tag or commit [default: main].")
@click.option(
    "--include", multiple=True, metavar="PATTERN", help="Only files that match, such as '*.json'; repeatable."
)
@shared_options.token
@output_options(interrupted="run the same command again: files that are there are not fetched again")
def command(repo: str, local_dir: Path | None, include: tuple[str, ...], output: Output, **options: Any) -> None:
    """Fetch the converted model OWNER/MODEL from the Hub, and check every byte of it.

    Files that are there already are not fetched again; an interrupted download goes on when it is run again.

    \b
    moe-convert download owner/my-mixtral-2bit
    moe-convert download owner/my-mixtral-2bit --local-dir my-mixtral-2bit
    """
    from formats import INDEX_NAME
    from formats.hub import HubRepo
    from formats.unconverted import check_converted_repo

    source = HubRepo.open(repo, options["revision"], options["token"])
    patterns = list(include) or None
    if patterns is None:
        check_converted_repo(source)
    _check_place(source, patterns, local_dir)
    folder = source.snapshot(patterns, local_dir=local_dir, bars=not output.quiet)
    files = source.matching(patterns)
    if patterns is None and INDEX_NAME in source.files:
        problems = _against_index(
            folder, f"moe-convert repair {shlex.quote(str(folder))} --from {repo}" if local_dir else None, output
        )
    else:
        problems = _against_hub(folder, files, output)
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


def _check_place(source: Any, patterns: list[str] | None, local_dir: Path | None) -> None:
    """Refuses a place without room, or that cannot be written, before the first byte comes."""
    from huggingface_hub import constants

    from formats.errors import DoesNotFitError, HubError

    files = source.matching(patterns)
    if not files:
        raise HubError(f"{source.repo}@{source.commit[:12]}: no file matches", "check --include")
    if source.offline:
        return
    place = local_dir or Path(constants.HF_HUB_CACHE)
    folder = next(p for p in (place, *place.absolute().parents) if p.exists())
    check_out_folder(folder)
    missing = [f for f in files if not (_has(local_dir, f) if local_dir else source.cached(f.name))]
    needed, free = sum(file.size for file in missing), shutil.disk_usage(folder).free
    if needed > free:
        raise DoesNotFitError(f"{place}: the download needs {needed} bytes, free are {free}", "free some space")


def _has(folder: Path, file: Any) -> bool:
    path = folder / file.name
    return path.is_file() and bool(path.stat().st_size == file.size)


def _against_index(folder: Path, mend: str | None, output: Output) -> list[str]:
    """What is wrong with a converted folder, and the command that mends it; None in the cache, which stays as it is."""
    from formats.verify import verify_folder

    progress = output.progress()
    report = verify_folder(folder, read_data=True, progress=lambda done, total: progress("verifying", done, total))
    again = "delete the files that the damaged ones link to, and run the same command again"
    return [*(problem.message for problem in report.problems), f"  next: {mend or again}"] if report.problems else []


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
            problems.append(f"{folder / file.name}: its hash is not the Hub's, {file.etag}; delete it and run again")
        done += file.size
        progress("verifying", done, total)
    return problems
