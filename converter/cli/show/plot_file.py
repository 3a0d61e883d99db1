"""Writes figures."""

import io
from pathlib import Path
from typing import Any

from formats.files.partial_file import write_file


def save_plot(figure: Any, path: Path) -> None:
    """Write a matplotlib figure atomically: the same figure gives the same bytes."""
    from matplotlib import rc_context

    drawing = io.BytesIO()
    metadata = {"Date": None} if path.suffix == ".svg" else None
    # Without a salt, ids in an SVG are random.
    with rc_context({"svg.hashsalt": "moe-convert"}):
        figure.savefig(drawing, format=path.suffix[1:], dpi=150, metadata=metadata)
    write_file(path, drawing.getvalue())
