"""moe-convert convert"""

from pathlib import Path
from typing import Any

import click

from converter.cli.output import Output, gigabytes, output_options, table
from formats.errors import DoesNotFitError


@click.command("convert", epilog="Run it again after an interruption: it goes on where it stopped.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--out-dir", type=click.Path(path_type=Path), help="Where to write [default: MODEL-RECIPE].")
@click.option(
    "--recipe", "recipe_name", default="2bit", show_default=True, help="2bit, 3bit, 4bit, paper-2bit or paper-3bit."
)
@click.option("-b", "--bits", type=int, help="Bits of the experts instead of the recipe's: 2, 3 or 4.")
@click.option("--attn-bits", type=int, help="Bits of attention: 4, or 16 for as in the source.")
@click.option("--head-bits", type=int, help="Bits of the output head: 4, or 16 for as in the source [default: 16].")
@click.option("--group-size", type=int, help="Weights that share a scale: 16, 32 or 64, where a packing has it.")
@click.option("--gate-up", help="Packing of the experts' gate and up, by name.")
@click.option("--down", help="Packing of the experts' down, by name.")
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
    "--codec",
    type=click.Choice(["none", "zstd"]),
    default="none",
    show_default=True,
    help="Compress each expert; saves a few per cent, for archives and slow links.",
)
@click.option("--revision", help="Branch, tag or commit of the Hub repository [default: main].")
@click.option("--token", help="For gated and private repositories [default: the one of hf auth login, or HF_TOKEN].")
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
@click.option("--dry-run", is_flag=True, help="Print sizes, bits, files, memory and disk, and write nothing.")
@click.option("--no-resume", is_flag=True, help="Throw an unfinished conversion in the out folder away first.")
@click.option("--force", is_flag=True, help="Write to a folder that is not ours, or replace a complete conversion.")
@output_options
def command(model: Path, out_dir: Path | None, output: Output, **options: Any) -> None:  # fmt: skip
    """Quantize the Mixtral checkpoint MODEL and write it in the expert-addressable format.

    MODEL is a folder, or owner/name of a repository on the Hub: its shards are fetched as they are needed and deleted
    when they are done; those in the cache of huggingface_hub are used where they are.

    \b
    moe-convert convert ./Mixtral-8x7B-Instruct-v0.1
    moe-convert convert mistralai/Mixtral-8x7B-Instruct-v0.1 --max-disk 12GB
    moe-convert convert ./my-finetune -o out --recipe 3bit --max-workers 4
    moe-convert convert ./my-finetune --calibrate builtin
    moe-convert convert ./my-finetune --dry-run
    """
    from converter.convert import ConvertOptions, convert_checkpoint
    from converter.recipes import make_recipe
    from converter.sizes import check_disk, plan_output
    from converter.solvers import choose_solver
    from converter.source import Checkpoint

    calibrate, calibration_file = _calibration(options["calibrate"])
    recipe = make_recipe(
        options["recipe_name"],
        **{
            name: options[name]
            for name in (
                "bits",
                "attn_bits",
                "head_bits",
                "group_size",
                "gate_up",
                "down",
                "solver",
                "calibration_tokens",
            )
        },
        calibrate=calibrate,
    )
    source, out = _source(model, out_dir, recipe.name, options)
    with Checkpoint(source) as checkpoint:
        plan = plan_output(checkpoint, recipe)
        source_bytes, fetch_bytes = checkpoint.n_bytes, checkpoint.fetch_bytes
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
    facts["done"] = done.done
    if done.quality:
        facts["weight_error"] = {name: done.quality["totals"][name] for name in ("experts", "attention")}
    output.result(facts, _text(facts))


def _source(model: Path, out: Path | None, recipe: str, options: dict[str, Any]) -> tuple[Any, Path]:
    """(folder or HubModel, out folder): a folder goes before a repository of the same name."""
    from converter.hub_model import HubModel
    from formats.hub import is_repo_name
    from formats.sizes import parse_size

    name = str(model)
    remote = [f"--{o.replace('_', '-')}" for o in ("revision", "token", "max_disk", "no_keep") if options[o]]
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
    return {
        "out_dir": str(out),
        "recipe": recipe.name,
        "solver": recipe.solver,
        "calibration": recipe.options.get("calibrate", "none"),
        "source_bytes": source_bytes,
        "converted_bytes": plan.total_bytes,
        "expert_bits": round(plan.expert_bits, 4),
        "attention_bits": round(plan.attention_bits, 4),
        "expert_bytes": plan.layouts[0][0].n_bytes,
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
