"""Folders of the project."""

import os
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
VECTORS = ROOT / "tests" / "vectors"
EXAMPLE = ROOT / "examples" / "tiny-mixtral"

_PYTEST = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
SEARCH_PATH = [os.fspath(ROOT / folder) for folder in _PYTEST["pythonpath"]]
"""Folders of modules that tests import by bare name, for programs outside pytest."""
