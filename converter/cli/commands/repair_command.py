"""`moe-convert repair`: replaces the damaged parts of a converted folder."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from converter.cli.options import shared_options
from converter.cli.options.early_checks import check_out_folder
from converter.cli.show.console import Output, output_options


@click.command(
    "repair",
    epilog="""\b
Examples:
  moe-convert repair ./my-mixtral-2bit --from owner/my-mixtral-2bit
  moe-convert repair ./my-mixtral-2bit --from ./Mixtral-8x7B-Instruct-v0.1
  moe-convert repair ./my-mixtral-2bit --index

Exit code 3 if something is still damaged; finished repairs are kept.""",
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--from",
    "origin",
    metavar="OWNER/MODEL|SOURCE",
    help="Repository where the folder was published (damaged experts are downloaded), or the source"
    " checkpoint, a folder or repository (damaged experts are converted again).",
)
@click.option(
    "--index",
    "index_too",
    is_flag=True,
    help="Rebuild the index from the headers and hashes of the files.",
)
@click.option(
    "--calibration-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Calibration text, if the conversion used --calibrate FILE.",
)
@shared_options.adapters
@click.option(
    "--revision",
    metavar="NAME",
    help="Branch, tag or commit of the repository [default: main; for a source checkpoint, the"
    " converted commit].",
)
@shared_options.token
@output_options(interrupted="run the same command again: finished repairs are kept")
def command(
    path: Path,
    origin: str | None,
    index_too: bool,
    calibration_file: Path | None,
    adapters: tuple[str, ...],
    output: Output,
    **remote: str | None,
) -> None:
    """Replace the damaged parts of the converted folder PATH, and nothing else.

    New bytes must match the index's sha256. A repaired file is written under another name, then
    renamed. Without --from the command repairs headers, padding, and files that another program
    rewrote in another order. With --index it rebuilds a damaged index: layers and trunk come from
    the files; producer, source, recipe and the list of copied files must still be readable in the
    index.
    """
    from formats.index import read_index
    from formats.repair.index_rebuild import rebuild_index
    from formats.repair.repairs import repair_folder
    from formats.repair_hints import repair_command
    from formats.unconverted import check_converted

    if index_too and origin:
        raise click.UsageError(
            "give --index or --from, not both: --from OWNER/MODEL also downloads the index"
        )
    check_converted(path)
    check_out_folder(path)
    if index_too:
        rebuild_index(path)
        output.result(
            {"ok": True, "files": ["moe_index.json"], "experts": [], "kept": []},
            "the index was rebuilt",
        )
        return
    with _origin(path, origin, calibration_file, adapters, remote) as source:
        index = read_index(path)
        done = repair_folder(
            path,
            index,
            source or _nothing(repair_command(path, index)),
            output.progress(),
        )
    lines = [f"rewritten: {name}" for name in done.files]
    lines += [f"replaced: layer {layer} expert {expert}" for layer, expert in done.experts]
    lines += [f"kept with your changes: {name}" for name in done.kept]
    facts = {
        "ok": True,
        "files": done.files,
        "experts": [list(key) for key in done.experts],
        "kept": done.kept,
    }
    rest = "every other byte" if done.kept else "every byte"
    output.result(facts, "\n".join([*lines, f"ok: {rest} matches the index"]))


@contextlib.contextmanager
def _origin(
    path: Path,
    name: str | None,
    calibration_file: Path | None,
    adapters: tuple[str, ...],
    remote: dict[str, str | None],
) -> Iterator[Any]:
    """Yield the origin that --from names, or None.

    A repository of a converted model also replaces a missing or damaged index.
    """
    from converter.checkpoint.shards.hub_model import HubModel
    from converter.cli.steps.convert_source import open_adapters
    from converter.source_origin import SourceOrigin
    from formats import INDEX_NAME
    from formats.errors import FormatError, MoeConvertError
    from formats.files.overlap import refuse_overlap
    from formats.files.partial_file import write_file
    from formats.hub.hub_origin import HubOrigin
    from formats.hub.repo import HubRepo
    from formats.index import read_index
    from formats.repo_names import is_repo_name

    if name is None:
        yield None
        return
    if Path(name).exists() or not is_repo_name(name):
        refuse_overlap(path, Path(name), "the origin")
        if (Path(name) / INDEX_NAME).exists():
            raise MoeConvertError(
                f"{name} is a converted folder", f"copy the damaged files from {name}"
            )
        opened = open_adapters(adapters, remote["token"])
        with SourceOrigin(Path(name), read_index(path), calibration_file, opened) as source:
            yield source
        return
    repo = HubRepo.open(name, remote["revision"], remote["token"])
    if INDEX_NAME in repo.files:
        published = HubOrigin(repo)
        try:
            read_index(path)
        except FormatError:
            write_file(path / INDEX_NAME, published.index_bytes)
        yield published
        return
    index = read_index(path)
    revision = remote["revision"] or (index.source.revision if index.source.name == name else None)
    model = HubModel.open(name, revision, remote["token"], keep=False)
    opened = open_adapters(adapters, remote["token"])
    with SourceOrigin(model, index, calibration_file, opened) as source:
        yield source


def _nothing(hint: str) -> Any:
    from formats.repair.repairs import NoOrigin

    return NoOrigin(hint)
