"""Commands that repair a converted folder, as next steps in errors."""

import shlex
from pathlib import Path

from formats.index import Index
from formats.repo_names import is_repo_name


def repair_command(folder: Path, index: Index) -> str:
    """Return the command that repairs weights, with the index's source repository if it has one."""
    command = f"moe-convert repair {shlex.quote(str(folder))} --from"
    # The name is checked: the index may be a stranger's, and users run this command.
    if index.source.revision and is_repo_name(index.source.name):
        return f"{command} {index.source.name}  # or from where it was published"
    return f"{command} SOURCE  # the checkpoint, or OWNER/MODEL: where it was published"


def index_command(folder: Path) -> str:
    """Return the command that repairs the index."""
    command = f"moe-convert repair {shlex.quote(str(folder))}"
    return f"{command} --index  # or --from OWNER/MODEL: where it was published"
