"""`moe-convert export`: writes a converted model as a GGUF file for llama.cpp."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from converter.cli.options import shared_options
from converter.cli.options.early_checks import check_out_file, require_extra
from converter.cli.show.console import Output, output_options
from converter.cli.show.tables import table
from converter.gguf.choices import ATTENTION_CHOICES, EXPERT_CHOICES
from formats.sizes import format_size

if TYPE_CHECKING:
    from converter.gguf.tensor_plan import Tensor


@click.command(
    "export",
    epilog="""\b
Examples:
  moe-convert export ./my-mixtral-2bit -o my-mixtral-2bit.gguf
  moe-convert export ./my-mixtral-4bit -o my-mixtral-4bit.gguf --experts q4_1
  llama-cli -m my-mixtral-2bit.gguf""",
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="GGUF file to write.",
)
@click.option(
    "--experts",
    type=click.Choice(EXPERT_CHOICES),
    help="Type of the experts. f32 and f16 apply to all of them. The other types apply where the"
    " exact type is larger, or where there is none [default: only exact types].",
)
@click.option(
    "--attention",
    type=click.Choice(ATTENTION_CHOICES),
    help="Type of the attention, and of a packed head [default: as stored; f16 if packed].",
)
@click.option(
    "--license",
    "license_id",
    metavar="ID",
    help="Licence of the weights by its Hub id, such as apache-2.0, for the file's metadata"
    " [default: that of the model card].",
)
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check the model, print types and sizes, and write nothing.",
)
@shared_options.check
@shared_options.revision
@shared_options.token
@output_options(interrupted="nothing was written; the next run starts anew")
def command(
    path: Path,
    out: Path,
    experts: str | None,
    attention: str | None,
    license_id: str | None,
    force: bool,
    dry_run: bool,
    check: str,
    output: Output,
    **options: Any,
) -> None:
    """Write the converted model PATH as one GGUF file for llama.cpp, ollama and LM Studio.

    PATH is a folder, or owner/name of a repository on the Hub, which is downloaded first. The
    output names every type that changes weights. docs/export.md lists the model types, and what
    each recipe becomes. Other model types are refused. An interrupted export leaves nothing.
    """
    require_extra("gguf", "gguf", "export")
    import loader
    from converter.gguf.block_types import type_named
    from converter.gguf.gguf_file import plan_export, write_gguf
    from converter.gguf.options import ExportOptions
    from converter.publish.folder_card import card_license
    from formats.errors import OutputError
    from formats.files.overlap import refuse_inputs
    from formats.files.partial_file import partial_path
    from loader.repository import open_model

    check_out_file(out)
    if path.is_dir():
        refuse_inputs([out, partial_path(out)], path.rglob("*"))
    if out.exists() and not force and not dry_run:
        raise OutputError(f"{out} exists", "choose another name, or replace it with --force")
    opened = open_model(path, options["revision"], options["token"], lazy=False, progress=None)
    folder = opened.artifact.folder
    chosen = ExportOptions(
        experts=type_named(experts) if experts else None,
        attention=type_named(attention) if attention else None,
        check=check,
        license=license_id or card_license(folder),
    )
    plan = plan_export(opened.artifact, loader.load_tokenizer(folder, check=check), chosen)
    if not dry_run:
        with opened.reader("mmap", check=check) as reader:
            write_gguf(plan, reader, out, output.progress())
    parts = _parts(plan.tensors)
    facts = {
        "out": str(out),
        "bytes": plan.total_bytes,
        "written": not dry_run,
        "exact": all(row["loss"] == "exact" for row in parts),
        "parts": parts,
    }
    output.result(facts, _text(out, plan.total_bytes, parts, dry_run))


def _parts(tensors: list["Tensor"]) -> list[dict[str, Any]]:
    """Return a row for each part, stored form and type: its weights, bits and loss."""
    from converter.gguf.block_types import bits_per_weight

    weights: dict[tuple[str, str, str, str], int] = {}
    bits: dict[str, float] = {}
    for tensor in tensors:
        bits[tensor.kind.name] = bits_per_weight(tensor.kind)
        share = tensor.n_weights // len(tensor.stored)
        for stored, loss in zip(tensor.stored, tensor.losses, strict=True):
            key = tensor.part, stored, tensor.kind.name, loss
            weights[key] = weights.get(key, 0) + share
    return [
        {
            "part": part,
            "stored": stored,
            "type": kind,
            "bits": bits[kind],
            "weights": count,
            "loss": loss,
        }
        for (part, stored, kind, loss), count in weights.items()
    ]


def _text(out: Path, n_bytes: int, parts: list[dict[str, Any]], dry_run: bool) -> str:
    rows = [("part", "stored as", "GGUF type", "bits", "million weights", "change")]
    rows += [
        (
            row["part"],
            row["stored"],
            row["type"],
            f"{row['bits']:g}",
            f"{row['weights'] / 1e6:.1f}",
            row["loss"],
        )
        for row in parts
    ]
    done = "would write" if dry_run else "wrote"
    return f"{table(rows)}\n{done} {out}, {format_size(n_bytes)}"
