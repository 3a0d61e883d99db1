"""`moe-convert convert`: quantizes a checkpoint into a folder of experts that load one by one."""

import sys
from pathlib import Path
from typing import Any

import click

from converter.cli.options.convert_options import with_convert_options
from converter.cli.show.console import Output, output_options
from converter.cli.show.convert_facts import facts_of, needs_of, summary_of, text_of
from converter.cli.steps.convert_source import (
    check_upload,
    convert_options_of,
    open_adapters,
    open_source,
    recipe_of,
)
from converter.cli.steps.publication import upload


@click.command(
    "convert",
    epilog="""\b
Examples:
  moe-convert convert ./Mixtral-8x7B-Instruct-v0.1
  moe-convert convert mistralai/Mixtral-8x7B-Instruct-v0.1 --max-disk 12GB
  moe-convert convert ./my-finetune -o out --recipe 3bit --max-workers 4
  moe-convert convert ./my-finetune --target-bpw 2.7
  moe-convert convert ./my-finetune --bits 16 --attn-bits 16
  moe-convert convert mistralai/Mixtral-8x7B-v0.1 --adapter ./my-lora
  moe-convert convert ./my-finetune --dry-run

After an interruption, run the same command again: it resumes.""",
)
@click.argument("model", type=click.Path(path_type=Path))
@with_convert_options
@output_options(interrupted="run the same command again: it resumes")
def command(model: Path, out_dir: Path | None, output: Output, **options: Any) -> None:
    """Quantize the checkpoint MODEL and write a folder whose experts load one by one.

    MODEL is a folder, or owner/name of a repository on the Hub. Shards of a repository are
    downloaded when they are needed and deleted afterwards; shards in huggingface_hub's cache are
    read in place.

    With --adapter, LoRA adapters of PEFT are merged into the weights before they are quantized. The
    result has the same bytes as PEFT's merge_and_unload followed by a conversion.
    """
    from converter.checkpoint.source import Checkpoint
    from converter.conversion.flow import convert
    from converter.conversion.plan import plan_conversion

    recipe = recipe_of(options)
    how = convert_options_of(options)
    source, out = open_source(model, out_dir, recipe.name, options)
    check_upload(source, options)
    adapters = open_adapters(options["adapters"], options["token"])
    pinned: dict[str, Any] = (
        {} if isinstance(source, Path) else {"source": f"{source.repo.repo}@{source.repo.commit}"}
    )
    if adapters:
        pinned["adapters"] = [adapter.where for adapter in adapters]
    with Checkpoint(source, adapters) as checkpoint:
        if checkpoint.tokenizer_folder != checkpoint.folder:
            pinned["tokenizer"] = str(checkpoint.tokenizer_folder)
        plan = plan_conversion(checkpoint, recipe, how, out)
        if options["dry_run"]:
            facts = pinned | facts_of(plan.output, recipe, checkpoint.n_bytes, out) | needs_of(plan)
            facts |= {"fetched_disk_bytes": checkpoint.fetch_bytes} if checkpoint.hub else {}
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
        facts["upload"], uploaded = upload(
            out,
            options["upload_repo"],
            output,
            private=options["private"],
            license_id=options["license_id"],
            token=options["token"],
        )
        text += f"\n{uploaded}"
    output.result(facts, text)
    if options["upload_repo"] and not facts["upload"]["ok"]:
        sys.exit(3)
