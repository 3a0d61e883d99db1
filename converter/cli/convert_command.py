"""moe-convert convert"""

import sys
from pathlib import Path
from typing import Any

import click

from converter.cli import shared_options
from converter.cli.output import Output, gigabytes, output_options, table
from formats.errors import DoesNotFitError

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
@click.option("-o", "--out-dir", type=click.Path(path_type=Path), help="Where to write [default: MODEL-RECIPE].")
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
@click.option("--head-bits", type=int, help="Bits of the output head: 4, or 16 for as in the source [default: 16].")
@click.option("--group-size", type=int, help="Weights that share a scale: 16, 32 or 64, where a packing has it.")
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
    "--no-keep", is_flag=True, help="Read the Hub's shards by ranges and keep nothing; no hash can be checked."
)
@click.option("--max-workers", type=click.IntRange(1), help="Threads [default: the processors, as memory allows].")
@click.option("--max-memory", help="Upper limit for the process, such as 2GiB; lowers the number of workers.")
@click.option(
    "--layers", "part", metavar="I/N", help="Only the I-th of N parts of the layers; a later run does the rest."
)
@click.option("--upload-repo", metavar="OWNER/MODEL", help="Publish the result there, as moe-convert upload does.")
@click.option("--private", is_flag=True, help="With --upload-repo: make a new repository private.")
@click.option("--license", "license_id", metavar="ID", help="With --upload-repo: the weights' licence (see upload).")
@click.option("--dry-run", is_flag=True, help="Print sizes, bits, files, memory and disk, and write nothing.")
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
@output_options
def command(model: Path, out_dir: Path | None, output: Output, **options: Any) -> None:  # fmt: skip
    """Quantize the Mixtral checkpoint MODEL and write it in the expert-addressable format.

    MODEL is a folder, or owner/name of a repository on the Hub: its shards are fetched as they are needed and deleted
    when they are done; those in the cache of huggingface_hub are used where they are.

    \b
    moe-convert convert ./Mixtral-8x7B-Instruct-v0.1
    moe-convert convert mistralai/Mixtral-8x7B-Instruct-v0.1 --max-disk 12GB
    moe-convert convert ./my-finetune -o out --recipe 3bit --max-workers 4
    moe-convert convert ./my-finetune --target-bpw 2.7
    moe-convert convert ./my-finetune --bits 16 --attn-bits 16
    moe-convert convert ./my-finetune --dry-run
    """
    from converter.convert import ConvertOptions, convert_checkpoint
    from converter.recipe_file import recipe_settings
    from converter.recipes import make_recipe
    from converter.sizes import check_disk, plan_output
    from converter.solvers import choose_solver
    from converter.source import Checkpoint

    calibrate, calibration_file = _calibration(options["calibrate"])
    settings = recipe_settings(options["recipe_name"])
    settings |= {name: options[name] for name in _OF_RECIPE if options[name] is not None}
    settings |= {"calibrate": calibrate} if calibrate else {}
    settings |= {"down_width": _width(options["down_width"])} if options["down_width"] else {}
    settings["rules"] = [*settings.get("rules", []), *options["layer_bits"]]
    recipe = make_recipe(**settings)
    source, out = _source(model, out_dir, recipe.name, options)
    with Checkpoint(source) as checkpoint:
        plan = plan_output(checkpoint, recipe)
        source_bytes, fetch_bytes = checkpoint.n_bytes, checkpoint.fetch_bytes
        _check_upload(checkpoint.folder, options)
        pinned = {"source": f"{checkpoint.name}@{checkpoint.revision}"} if checkpoint.hub else {}
        check_disk(plan, out, options["codec"], fetch_bytes)
    solver = choose_solver(recipe.solver)
    workers = _workers(plan, solver, options["max_workers"], options["max_memory"])
    facts = pinned | _facts(plan, recipe, source_bytes, out)
    if options["dry_run"]:
        facts |= _needs(plan, solver, workers, out) | ({"fetched_disk_bytes": fetch_bytes} if pinned else {})
        output.result(facts, _text(facts))
        return
    done = convert_checkpoint(
        source,
        out,
        recipe,
        ConvertOptions(
            max_workers=workers,
            codec=options["codec"],
            resume=not options["no_resume"],
            force=options["force"],
            calibration_file=calibration_file,
            part=_part(options["part"]),
        ),
        output.progress(),
    )
    facts |= _facts(done.plan, done.recipe, source_bytes, out)
    facts["done"] = done.done
    if done.quality:
        facts["weight_error"] = {name: done.quality["totals"][name] for name in ("experts", "attention")}
    text = _text(facts)
    if options["upload_repo"]:
        from converter.cli.upload_command import upload

        wishes = {name: options[name] for name in ("private", "license_id", "token")}
        facts["upload"], uploaded = upload(out, options["upload_repo"], output, **wishes)
        text += f"\n{uploaded}"
    output.result(facts, text)
    if options["upload_repo"] and not facts["upload"]["ok"]:
        sys.exit(3)


def _check_upload(source: Path, options: dict[str, Any]) -> None:
    """What would be refused after the conversion is refused before it."""
    from converter.publish import check_license

    if options["upload_repo"]:
        if options["part"]:
            raise click.UsageError("--upload-repo: a part of the layers cannot be published")
        check_license([p.name for p in source.iterdir()], options["license_id"], source)
    elif options["private"] or options["license_id"]:
        raise click.UsageError("--private, --license: only with --upload-repo")


def _source(model: Path, out: Path | None, recipe: str, options: dict[str, Any]) -> tuple[Any, Path]:
    """(folder or HubModel, out folder): a folder goes before a repository of the same name."""
    from converter.hub_model import HubModel
    from formats.hub import is_repo_name
    from formats.sizes import parse_size

    name = str(model)
    only_remote = ("revision", "max_disk", "no_keep", *(() if options["upload_repo"] else ("token",)))
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
        max_disk_bytes=parse_size(options["max_disk"], "--max-disk") if options["max_disk"] else None,
        resume=None if options["no_resume"] or options["force"] else out,
    )
    return source, out


def _facts(plan: Any, recipe: Any, source_bytes: int, out: Path) -> dict[str, Any]:
    from converter.bit_budget import TARGET
    from converter.bit_rules import rules_of

    rules = [rule.text for rule in rules_of(recipe)]
    if TARGET in recipe.options and not rules:
        rules = ["chosen by calibration"]
    return {
        "out_dir": str(out),
        "recipe": recipe.name,
        **({"layer_bits": rules} if rules else {}),
        "solver": recipe.solver,
        "calibration": recipe.options.get("calibrate", "none"),
        "source_bytes": source_bytes,
        "converted_bytes": plan.total_bytes,
        "expert_bits": round(plan.expert_bits, 4),
        "attention_bits": round(plan.attention_bits, 4),
        "expert_bytes": plan.largest_expert_bytes,
        "files": len(plan.layouts) + 1,
    }


def _needs(plan: Any, solver: Any, workers: int, out: Path) -> dict[str, Any]:
    import shutil

    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    return {
        "workers": workers,
        "memory_bytes": plan.memory_bytes(workers, solver),
        "free_disk_bytes": shutil.disk_usage(parent).free,
    }


def _text(facts: dict[str, Any]) -> str:
    rows = []
    for name, value in facts.items():
        if isinstance(value, dict):
            rows += [(f"{name.replace('_', ' ')} ({key})", f"{number:.4f}") for key, number in value.items()]
        elif isinstance(value, list):
            rows += [(name.replace("_", " "), text) for text in value]
        elif name.endswith("_bytes"):
            rows.append((name.removesuffix("_bytes").replace("_", " ") + " size", f"{gigabytes(value)}"))
        else:
            rows.append((name.replace("_", " "), str(value)))
    return table(rows, left=2)


def _calibration(value: str | None) -> tuple[str | None, Path | None]:
    """(kind, file) of --calibrate: what is none of the kinds is a file."""
    from converter.calibration_text import KINDS

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


def _workers(plan: Any, solver: Any, asked: int | None, max_memory: str | None) -> int:
    """As many as asked for, or processors; fewer where memory would not do."""
    import os

    import psutil

    from formats.sizes import parse_size

    workers = asked or len(os.sched_getaffinity(0))
    limit = parse_size(max_memory, "--max-memory") if max_memory else None
    if limit is None and asked is None:
        limit = int(psutil.virtual_memory().available * 0.9)
    if limit is None:
        return workers
    while workers > 1 and plan.memory_bytes(workers, solver) > limit:
        workers -= 1
    if max_memory and plan.memory_bytes(workers, solver) > limit:
        raise DoesNotFitError(
            f"--max-memory {limit}: one worker takes about {plan.memory_bytes(1, solver)} bytes", "allow that much"
        )
    return workers
