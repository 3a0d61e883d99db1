"""moe-convert convert"""

import sys
from pathlib import Path
from typing import Any

import click

from converter.cli.options import shared_options
from converter.cli.show.console import Output, output_options
from converter.cli.show.convert_facts import facts_of, needs_of, summary_of, text_of

_OF_RECIPE = (
    "bits",
    "attn_bits",
    "head_bits",
    "group_size",
    "gate_up",
    "down",
    "solver",
    "calibration_tokens",
    "target_bpw",
)
"""Options that are arguments of `make_recipe`."""


@click.command("convert", epilog="Run it again after an interruption: it goes on where it stopped.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out-dir",
    type=click.Path(path_type=Path),
    help="Where to write [default: MODEL-RECIPE].",
)
@click.option(
    "--recipe",
    "recipe_name",
    default="2bit",
    show_default=True,
    help="2bit, 2bit-down3 (down with 3 bits), 3bit, 4bit, 16bit (all as in the source), paper-2bit, paper-3bit, or a"
    " FILE.json.",
)
@click.option(
    "-b",
    "--bits",
    "--expert-bits",
    "bits",
    type=int,
    help="Bits of the experts instead of the recipe's: 2, 3, 4, or 16 for as in the source.",
)
@click.option("--attn-bits", type=int, help="Bits of attention: 4, or 16 for as in the source.")
@click.option(
    "--head-bits",
    type=int,
    help="Bits of the output head: 4, or 16 for as in the source [default: 16].",
)
@click.option(
    "--group-size",
    type=int,
    help="Weights that share a scale: 16, 32 or 64, where a packing has it.",
)
@click.option("--gate-up", help="Packing of the experts' gate and up, by name.")
@click.option("--down", help="Packing of the experts' down, by name.")
@click.option(
    "--layer-bits",
    multiple=True,
    metavar="RULE,RULE",
    help="Other bits for some layers: 0-3=3bit, 28-31/down=3bit, 5:0-1=4bit (two experts); the last that fits counts.",
)
@click.option(
    "--target-bpw",
    type=float,
    metavar="BITS",
    help="Bits a weight of the experts, such as 2.7: calibration finds the layers that need more than the recipe's.",
)
@click.option(
    "--solver",
    help="feedback (calibrated), refit (without), hqq (quickest), or hqq-package (slow; the oracle)"
    " [default: feedback; hqq in the paper's recipes].",
)
@click.option(
    "--calibrate",
    metavar="none|random|builtin|FILE",
    help="Tokens by whose activations the solver feedback weighs errors: random ones, a text that is shipped, or"
    " a UTF-8 text of several kinds [default: builtin with feedback].",
)
@click.option("--calibration-tokens", type=int, help="How many [default: 8192].")
@click.option(
    "--down-width",
    metavar="COLUMNS|full",
    help="Columns of down that make up for each other's errors, a multiple of 256: better, slower, more memory"
    " [default: 256].",
)
@click.option(
    "--codec",
    type=click.Choice(["none", "zstd"]),
    default="none",
    show_default=True,
    help="Compress each expert; saves a few per cent, for archives and slow links.",
)
@shared_options.revision
@shared_options.token
@click.option(
    "--max-disk",
    metavar="SIZE",
    help="Most that fetched shards may take, such as 12GB [default: four shards]; each goes when it is done.",
)
@click.option(
    "--no-keep",
    is_flag=True,
    help="Read the Hub's shards by ranges and keep nothing; no hash can be checked.",
)
@click.option(
    "--max-workers",
    type=click.IntRange(1),
    help="Threads [default: the processors, as memory allows].",
)
@click.option(
    "--max-memory", help="Upper limit for the process, such as 2GiB; lowers the number of workers."
)
@click.option(
    "--layers",
    "part",
    metavar="I/N",
    help="Only the I-th of N parts of the layers; a later run does the rest.",
)
@click.option(
    "--upload-repo",
    metavar="OWNER/MODEL",
    help="Publish the result there, as moe-convert upload does.",
)
@click.option("--private", is_flag=True, help="With --upload-repo: make a new repository private.")
@click.option(
    "--license",
    "license_id",
    metavar="ID",
    help="With --upload-repo: the weights' licence (see upload).",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check what a conversion checks first, print sizes, bits, memory and disk, and write nothing.",
)
@click.option(
    "--no-resume",
    is_flag=True,
    help="Throw an unfinished conversion in the out folder away first: its files, and no others.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Write to a folder that is not ours, or replace a complete conversion: files of the names that are written are"
    " replaced, all others stay. The source's folder is refused all the same.",
)
@output_options(interrupted="run the same command again: it goes on where it stopped")
def command(model: Path, out_dir: Path | None, output: Output, **options: Any) -> None:  # fmt: skip
    """Quantize the checkpoint MODEL and write it in the expert-addressable format.

    MODEL is a folder, or owner/name of a repository on the Hub: its shards are fetched as they are
    needed and deleted when they are done; those in the cache of huggingface_hub are used where they
    are.

    \b
    moe-convert convert ./Mixtral-8x7B-Instruct-v0.1
    moe-convert convert mistralai/Mixtral-8x7B-Instruct-v0.1 --max-disk 12GB
    moe-convert convert ./my-finetune -o out --recipe 3bit --max-workers 4
    moe-convert convert ./my-finetune --target-bpw 2.7
    moe-convert convert ./my-finetune --bits 16 --attn-bits 16
    moe-convert convert ./my-finetune --dry-run
    """
    from converter.checkpoint.source import Checkpoint
    from converter.conversion.flow import convert
    from converter.conversion.plan import plan_conversion
    from converter.convert_options import ConvertOptions
    from converter.recipe.recipe_file import recipe_settings
    from converter.recipe.recipes import make_recipe
    from formats.sizes import parse_size

    calibrate, calibration_file = _calibration(options["calibrate"])
    settings = recipe_settings(options["recipe_name"])
    settings |= {name: options[name] for name in _OF_RECIPE if options[name] is not None}
    settings |= {"calibrate": calibrate} if calibrate else {}
    settings |= {"down_width": _width(options["down_width"])} if options["down_width"] else {}
    settings["rules"] = [*settings.get("rules", []), *options["layer_bits"]]
    recipe = make_recipe(**settings)
    how = ConvertOptions(
        max_workers=options["max_workers"],
        codec=options["codec"],
        resume=not options["no_resume"],
        force=options["force"],
        calibration_file=calibration_file,
        part=_part(options["part"]),
        max_memory_bytes=parse_size(options["max_memory"], "--max-memory")
        if options["max_memory"]
        else None,
    )
    source, out = _source(model, out_dir, recipe.name, options)
    _check_upload(source, options)
    pinned = (
        {} if isinstance(source, Path) else {"source": f"{source.repo.repo}@{source.repo.commit}"}
    )
    with Checkpoint(source) as checkpoint:
        plan = plan_conversion(checkpoint, recipe, how, out)
        if options["dry_run"]:
            facts = pinned | facts_of(plan.output, recipe, checkpoint.n_bytes, out) | needs_of(plan)
            facts |= {"fetched_disk_bytes": checkpoint.fetch_bytes} if pinned else {}
            output.result(facts, text_of(facts))
            return
        output.note(summary_of(plan))
        done = convert(plan, output.progress())
    facts = pinned | facts_of(done.plan, done.recipe, done.source_bytes, out) | {"done": done.done}
    if done.quality:
        facts["weight_error"] = {
            name: done.quality["totals"][name] for name in ("experts", "attention")
        }
    text = text_of(facts)
    if options["upload_repo"]:
        from converter.cli.commands.upload_command import upload

        facts["upload"], uploaded = upload(
            out, options["upload_repo"], output, **_publication(options)
        )
        text += f"\n{uploaded}"
    output.result(facts, text)
    if options["upload_repo"] and not facts["upload"]["ok"]:
        sys.exit(3)


def _publication(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("private", "license_id", "token")}


def _check_upload(source: Any, options: dict[str, Any]) -> None:
    """Refuses before the conversion what the upload would refuse after it."""
    from converter.publish.hub_commit import (
        PublishOptions,
        check_license,
        check_repo_name,
        check_target,
    )

    repo = options["upload_repo"]
    if not repo:
        if options["private"] or options["license_id"]:
            raise click.UsageError("--private, --license: only with --upload-repo")
        return
    if options["part"]:
        raise click.UsageError("--upload-repo: a part of the layers cannot be published")
    check_repo_name(repo)
    folder = source if isinstance(source, Path) else source.folder
    if folder.is_dir():
        check_license([p.name for p in folder.iterdir()], options["license_id"], folder)
    check_target(
        PublishOptions(
            repo, options["private"], license=options["license_id"], token=options["token"]
        )
    )


def _source(
    model: Path, out: Path | None, recipe: str, options: dict[str, Any]
) -> tuple[Any, Path]:
    """(folder or HubModel, out folder): a folder goes before a repository of the same name."""
    from converter.checkpoint.shards.hub_model import HubModel
    from formats.hub.repo import is_repo_name
    from formats.sizes import parse_size

    name = str(model)
    only_remote = (
        "revision",
        "max_disk",
        "no_keep",
        *(() if options["upload_repo"] else ("token",)),
    )
    remote = [f"--{o.replace('_', '-')}" for o in only_remote if options[o]]
    if model.exists() or not is_repo_name(name):
        if remote:
            raise click.UsageError(
                f"{', '.join(remote)}: only for a repository on the Hub, and {name} is a folder's name"
            )
        return model, out or model.resolve().with_name(f"{model.resolve().name}-{recipe}")
    out = out or Path(f"{model.name}-{recipe}")
    source = HubModel.open(
        name,
        options["revision"],
        options["token"],
        keep=not options["no_keep"],
        max_disk_bytes=parse_size(options["max_disk"], "--max-disk")
        if options["max_disk"]
        else None,
        resume=None if options["no_resume"] or options["force"] else out,
    )
    return source, out


def _calibration(value: str | None) -> tuple[str | None, Path | None]:
    """(kind, file) of --calibrate: what is none of the kinds is a file."""
    from converter.calibration.calibration_text import KINDS

    if value is None or (value in KINDS and value != "file"):
        return value, None
    return "file", Path(value)


def _width(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _part(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal()):
        raise click.BadParameter(f"{text!r} is not I/N, such as 1/4", param_hint="--layers")
    return int(i), int(n)
