"""moe-convert verify"""

import dataclasses
import sys
from pathlib import Path

import click

from converter.cli.output import Output, gigabytes, output_options


@click.command("verify", epilog="Exit code 3 if anything is damaged.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--read-data", is_flag=True, help="Read everything and compare every sha256.")
@output_options
def command(path: Path, read_data: bool, output: Output) -> None:
    """Check the converted folder PATH: structure, sizes and headers; with --read-data every byte.

    \b
    moe-convert verify ./my-mixtral-2bit
    moe-convert verify ./my-mixtral-2bit --read-data
    """
    from formats.verify import verify_folder

    progress = output.progress()
    report = verify_folder(path, read_data=read_data, progress=lambda done, total: progress("verifying", done, total))
    lines = [f"{p.message}" + (f"\n  next: {p.hint}" if p.hint else "") for p in report.problems]
    if report.problems:
        lines.append(f"{len(report.problems)} problems")
    else:
        how = (
            f"{gigabytes(report.checked_bytes)} read and compared"
            if read_data
            else "structure only; --read-data reads every byte"
        )
        lines.append(f"ok: {report.files} files, {report.experts} experts, {gigabytes(report.total_bytes)} ({how})")
    output.result(dataclasses.asdict(report) | {"ok": not report.problems}, "\n".join(lines))
    if report.problems:
        sys.exit(3)
