"""Convert in a forked child for each line of standard input: a warm start for tests that kill.

    python kill_server.py SOURCE OUT WORKERS RECIPE

RECIPE is JSON: the keyword arguments of make_recipe. Prints the child's pid, then its exit status.
It imports torch once and never computes in the parent, so a fork is safe.
"""

import json
import os
import sys
from pathlib import Path

import hqq.core.quantize  # noqa: F401
import transformers.models.mixtral.modeling_mixtral  # noqa: F401

from converter.convert import ConvertOptions, convert_checkpoint
from converter.recipe.recipes import make_recipe

source, out, workers, recipe = (
    Path(sys.argv[1]),
    Path(sys.argv[2]),
    int(sys.argv[3]),
    json.loads(sys.argv[4]),
)
for _line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        done = convert_checkpoint(
            source, out, make_recipe("2bit", **recipe), ConvertOptions(workers)
        )
        os._exit(0 if done.done == "converted" else 7)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
