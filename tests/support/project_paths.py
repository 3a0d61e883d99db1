"""Folders of the project."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
VECTORS = ROOT / "tests" / "vectors"
EXAMPLE = ROOT / "examples" / "tiny-mixtral"
