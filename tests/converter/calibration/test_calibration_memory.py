"""Memory of a calibration pass, measured in its own process, against the formula of the
conversion's plan.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from make_checkpoint import Shape, make_checkpoint
from project_paths import ROOT

from converter.calibration.pass_memory import calibration_memory_bytes
from converter.checkpoint.outline import Outline

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layer of random weights whose activations need much more memory than the process's own
    noise.
    """
    folder = tmp_path_factory.mktemp("source") / "wide"
    make_checkpoint(folder, Shape(1024, 2048, 8, 2, experts=4), 1)
    return folder


def measured(folder: Path, *options: Any) -> dict[str, Any]:
    command = [sys.executable, ROOT / "bench" / "calibration.py", folder, "--json", *options]
    # Blocks of this shape are small enough for malloc to keep them when they are freed; those of an
    # 8x7B are not.
    environment = {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_a_pass_takes_at_most_what_the_plan_counts(folder: Path) -> None:
    found = measured(folder, "--tokens", 8192, "--workers", 2)
    assert found["estimated_bytes"] / 3 < found["peak_bytes"] < found["estimated_bytes"]


def test_the_formula_is_the_sum_that_it_states(folder: Path) -> None:
    architecture = Outline.of_folder(folder).architecture
    whole, each = calibration_memory_bytes(architecture, 8192, 256)
    stream, inputs, summed = [4 * 8192 * 1024] * 3
    inner = 2 * 8192 * 2 * 2048
    outputs = 4 * 8192 * 2 * 1024
    weights = 4 * 4 * 1024 * 1024
    moments = 4 * (3 * 1024**2 + 2048 * 256)
    of_pieces = (4 + 16) * 4 * 2048 * 256
    assert whole == stream + inputs + summed + inner + outputs + weights + moments + of_pieces
    assert each > 0
    assert calibration_memory_bytes(architecture, 0, 256) == (0, 0)
