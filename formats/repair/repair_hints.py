"""The commands that mend a converted folder, for errors that name damage."""

import shlex
from pathlib import Path

from formats.hub.repo import is_repo_name
from formats.index import Index


def repair_command(folder: Path, index: Index) -> str:
    """The command that mends weights: from where the folder was published, or from what it was made
    of.
    """
    mend = f"moe-convert repair {shlex.quote(str(folder))} --from"
    # The index may be a stranger's, and people run what stands here.
    if index.source.revision and is_repo_name(index.source.name):
        return f"{mend} {index.source.name}  # or from where it was published"
    return f"{mend} SOURCE  # the checkpoint, or OWNER/MODEL: where it was published"


def index_command(folder: Path) -> str:
    """The command that brings a good index."""
    mend = f"moe-convert repair {shlex.quote(str(folder))}"
    return f"{mend} --index  # or --from OWNER/MODEL: where it was published"
