"""moe-convert repair"""

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
    epilog="Exit code 3 if something stays damaged; what was mended until then stays mended.",
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--from", "origin", metavar="OWNER/MODEL|SOURCE",
    help="Where it was published (experts come by ranges), or the checkpoint that it was made from: a folder or a"
    " repository (experts are converted again).",
)  # fmt: skip
@click.option(
    "--index",
    "index_too",
    is_flag=True,
    help="Write the index again from the files' headers and hashes.",
)
@click.option(
    "--calibration-file",
    type=click.Path(path_type=Path),
    help="The text, if the recipe's was one of yours.",
)
@click.option(
    "--revision",
    help="Branch, tag or commit of OWNER/MODEL [default: main, or what was converted].",
)
@shared_options.token
@output_options(interrupted="run the same command again: what was mended stays mended")
def command(
    path: Path,
    origin: str | None,
    index_too: bool,
    calibration_file: Path | None,
    output: Output,
    **remote: str | None,
) -> None:
    """Mend what is damaged in the converted folder PATH: only that, and only by bytes with the
    index's sha256.

    A layer's file is written under another name and renamed. Without --from: headers, fillers, and
    files that another program saved again in another order. With --index, for when the index itself
    is damaged: layers and trunk come from the files; producer, source, recipe and the list of
    copied files only the index has, so they must still be there.

    \b
    moe-convert repair ./my-mixtral-2bit --from owner/my-mixtral-2bit
    moe-convert repair ./my-mixtral-2bit --from ./Mixtral-8x7B-Instruct-v0.1
    moe-convert repair ./my-mixtral-2bit --index
    """
    from formats.index import read_index
    from formats.repair.index_rebuild import rebuild_index
    from formats.repair.repair_hints import repair_command
    from formats.repair.repairs import repair_folder
    from formats.repair.unconverted import check_converted

    if index_too and origin:
        raise click.UsageError(
            "--index rebuilds from the folder alone; --from OWNER/MODEL brings the index too"
        )
    check_converted(path)
    check_out_folder(path)
    if index_too:
        rebuild_index(path)
        output.result(
            {"ok": True, "files": ["moe_index.json"], "experts": [], "kept": []},
            "the index was written again",
        )
        return
    progress = output.progress()
    with _origin(path, origin, calibration_file, remote) as source:
        index = read_index(path)
        done = repair_folder(
            path,
            index,
            source or _nothing(repair_command(path, index)),
            lambda n, of: progress("repairing", n, of),
        )
    lines = [f"written again: {name}" for name in done.files]
    lines += [f"replaced: layer {layer} expert {expert}" for layer, expert in done.experts]
    lines += [f"kept as you changed it: {name}" for name in done.kept]
    facts = {
        "ok": True,
        "files": done.files,
        "experts": [list(key) for key in done.experts],
        "kept": done.kept,
    }
    rest = "every other byte" if done.kept else "every byte"
    output.result(facts, "\n".join([*lines, f"ok: {rest} is as the index says"]))


@contextlib.contextmanager
def _origin(
    path: Path, name: str | None, calibration_file: Path | None, remote: dict[str, str | None]
) -> Iterator[Any]:
    """What --from means; None without. A repository also gives an index that is not there or cannot
    be read.
    """
    from converter.checkpoint.shards.hub_model import HubModel
    from converter.source_origin import SourceOrigin
    from formats import INDEX_NAME
    from formats.errors import FormatError, MoeConvertError
    from formats.files.overlap import refuse_overlap
    from formats.hub.hub_origin import HubOrigin
    from formats.hub.repo import HubRepo, is_repo_name
    from formats.index import read_index
    from formats.writer import write_file

    if name is None:
        yield None
        return
    if Path(name).exists() or not is_repo_name(name):
        refuse_overlap(path, Path(name), "the origin")
        if (Path(name) / INDEX_NAME).exists():
            raise MoeConvertError(
                f"{name} is a converted folder", "copy the damaged files from there"
            )
        with SourceOrigin(Path(name), read_index(path), calibration_file) as source:
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
    with SourceOrigin(model, index, calibration_file) as source:
        yield source


def _nothing(hint: str) -> Any:
    from formats.repair.repairs import NoOrigin

    return NoOrigin(hint)
