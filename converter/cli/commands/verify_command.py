"""`moe-convert verify`: checks a converted folder for damage."""

import dataclasses
import re
import sys
from pathlib import Path
from random import SystemRandom
from typing import TYPE_CHECKING, Any

import click

from converter.cli.show.console import Output, output_options
from formats.sizes import format_size

if TYPE_CHECKING:
    from formats.reading.verify import NotRead


@click.command(
    "verify",
    epilog="""\b
Examples:
  moe-convert verify ./my-mixtral-2bit
  moe-convert verify ./my-mixtral-2bit --read-data
  moe-convert verify ./my-mixtral-2bit --read-data-subset 5%

Exit code 3 if anything is damaged.""",
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--read-data", is_flag=True, help="Read all data and compare every sha256.")
@click.option(
    "--read-data-subset",
    metavar="N%",
    help="Read a random share of the experts and files, such as 5%. Each run draws another subset.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    metavar="N",
    help="Seed of --read-data-subset, as an earlier run printed it [default: random].",
)
@output_options(interrupted="nothing was changed; the next run starts from the beginning")
def command(
    path: Path, read_data: bool, read_data_subset: str | None, seed: int | None, output: Output
) -> None:
    """Check the converted folder PATH: structure, sizes and headers; with --read-data every byte.

    The command reports each damaged or missing expert with its file, layer, expert and offset, and
    the command that repairs it.
    """
    from formats.reading.verify import verify_folder

    sample = _sample(read_data, read_data_subset, seed)
    report = verify_folder(
        path,
        read_data=read_data or sample is not None,
        sample=sample,
        progress=output.progress(),
    )
    lines = [p.message for p in report.problems]
    if report.problems:
        lines.append(f"{len(report.problems)} problems")
        lines += [
            f"  next: {hint}" for hint in dict.fromkeys(p.hint for p in report.problems) if hint
        ]
    else:
        how = "structure only"
        if read_data or sample:
            how = f"{format_size(report.checked_bytes)} read and compared"
        lines.append(
            f"ok: {report.files} files, {report.experts} experts,"
            f" {format_size(report.total_bytes)} ({how})"
        )
    lines += [f"note: {note}" for note in report.notes]
    if left := _not_read(report.not_read):
        lines.append(f"not read: {left}" + ("" if read_data else "; --read-data reads them"))
    drawn = {"seed": sample.seed} if sample else {}
    if sample:
        lines.append(f"to read the same subset again: --seed {sample.seed}")
    output.result(
        dataclasses.asdict(report) | drawn | {"ok": not report.problems}, "\n".join(lines)
    )
    if report.problems:
        sys.exit(3)


def _not_read(left: "NotRead") -> str:
    """Return the part of the folder that was not hashed, as text; empty if all was hashed."""
    parts = [f"{left.experts} experts ({format_size(left.expert_bytes)})"] if left.experts else []
    if left.files:
        shown = ", ".join(left.files[:3]) + (
            f" and {len(left.files) - 3} more" if len(left.files) > 3 else ""
        )
        parts.append(f"{shown} ({format_size(left.file_bytes)})")
    return "the bytes of " + " and of ".join(parts) if parts else ""


def _sample(read_data: bool, share: str | None, seed: int | None) -> Any:
    """Return the Sample that the options describe, or None."""
    from formats.reading.verify import Sample

    if share is None:
        if seed is not None:
            raise click.UsageError("--seed needs --read-data-subset")
        return None
    if read_data:
        raise click.UsageError("give --read-data or --read-data-subset, not both")
    match = re.fullmatch(r"(\d{1,3}(?:\.\d{1,6})?)%", share)
    if not match or not 0 < float(match[1]) <= 100:
        raise click.BadParameter(
            f"{share!r} is not a share such as 5%", param_hint="--read-data-subset"
        )
    return Sample(float(match[1]) / 100, SystemRandom().randrange(10**6) if seed is None else seed)
