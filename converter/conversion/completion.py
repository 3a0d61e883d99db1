"""End of a conversion: the trunk, the files beside the weights, the index last."""

from typing import Any

from converter.conversion.index_assembly import assemble_index
from converter.conversion.plan import ConversionPlan
from converter.journal.finished_work import FinishedWork
from converter.journal.keys import ShardKey
from converter.journal.records import ShardRecord
from converter.output.output_files import OutputFiles
from converter.output.source_side_files import copy_files, write_config
from converter.output.weight_errors import write_quality
from converter.publish.folder_card import write_card
from formats import EXPERTS_FOLDER, INDEX_NAME
from formats.files.output_file import fsync_folder
from formats.files.partial_file import write_file
from formats.index import dump_index


def complete(
    plan: ConversionPlan, work: FinishedWork, files: OutputFiles, shard_sha256: dict[str, str]
) -> dict[str, Any]:
    """Complete the folder after its last unit and return the value of quality.json.

    shard_sha256: shard name -> sha256 in hex, for each shard of the source.
    """
    checkpoint = plan.checkpoint
    out = plan.out
    recipe = plan.recipe.recorded
    for name, sha256 in shard_sha256.items():
        if ShardKey(name) not in work:
            work.add(ShardRecord(name, sha256))
    files.trunk.finish()
    copied = [
        write_config(checkpoint.config, recipe, out),
        *copy_files(plan.side_files, out),
    ]
    quality = write_quality(work.records, out)
    index = assemble_index(
        plan,
        shard_sha256,
        files.trunk,
        [record for layer in range(len(plan.output.layouts)) if (record := work.layer(layer))],
        copied,
    )
    write_card(out, index, checkpoint.folder)
    # Removed partial files must not come back after a power loss.
    fsync_folder(out / EXPERTS_FOLDER)
    write_file(out / INDEX_NAME, dump_index(index))
    return quality
