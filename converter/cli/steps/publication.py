"""Verifies a converted folder and publishes it, for `upload` and `convert --upload-repo`."""

from pathlib import Path
from typing import Any

import click

from converter.cli.show.console import Output
from formats.sizes import format_size


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
        report = verify_folder(path, read_data=True, progress=output.progress())
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
    sizes = f"{len(done.sent)} files, {format_size(sum(done.sent.values()))}"
    what = f"would send {sizes}" if dry_run else f"sent {sizes}"
    lines = [f"{name}  {format_size(size)}" for name, size in done.sent.items()] if dry_run else []
    lines.append(f"{what}; {len(done.unchanged)} files unchanged, {len(done.deleted)} deleted")
    return facts, "\n".join([*lines, *([done.url] if done.url else [])])
