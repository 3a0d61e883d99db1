"""Power losses: the possible states of the disk after each call of a conversion."""

import random
from collections.abc import Callable

from faults.campaigns.disk_model import Disk, build
from faults.campaigns.kills import MOMENTS, check_index
from faults.campaigns.workshop import RESULT, Lane
from faults.shim import Kill

State = dict[str, bytes | None]
MODELS: dict[str, Callable[[Disk, random.Random], State]] = {
    "lost": lambda disk, state: disk.lost(),
    "kept": lambda disk, state: disk.kept(),
    "names only": lambda disk, state: disk.names_only(),
    "prefix": Disk.prefix,
    "subset": Disk.subset,
}


class PowerLoss:
    """A state of the disk, and sometimes a kill while the conversion continues from it.

    The same command then gives the same bytes; it refuses no folder.
    """

    def states(self, lane: Lane) -> None:
        """Endless."""
        return None

    def attempt(self, state: random.Random, lane: Lane) -> str:
        """Tries one state."""
        case, model = state.choice(lane.workshop.cases), state.choice(list(MODELS))
        calls = lane.workshop.good(case, lane).calls
        # The log has the paths of the lane that made it.
        out = next(call.path for call in calls if call.path.endswith(RESULT))
        root = out.removesuffix(RESULT)
        disk = Disk(root)
        for call in calls[: state.randint(1, len(calls))]:
            disk.take(call)
        lane.clear()
        build(MODELS[model](disk, state), root, lane.folder)
        check_index(lane)
        if state.random() < 0.25:
            lane.convert(
                case, faults=[Kill(state.choice(MOMENTS), RESULT, state.randint(1, len(calls)))]
            )
            check_index(lane)
        lane.check_resume(case)
        return f"{model}: same bytes"
