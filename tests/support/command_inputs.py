"""Good and bad inputs of every command, for tests of errors."""

from pathlib import Path

from made_traces import random_experts, trace_of
from project_paths import ROOT

from loader.traces.trace import write_trace

TEXT = ROOT / "examples" / "text" / "english.txt"


class Inputs:
    """Paths of good and bad inputs; the tables of test_cli_errors.py name them."""

    def __init__(self, folder: Path, example: Path, unfinished: Path, good: Path) -> None:
        self.checkpoint, self.unfinished, self.good = example, unfinished, good
        self.missing = folder / "not there"
        self.empty_folder = folder / "empty folder"
        self.empty_folder.mkdir()
        self.file = folder / "a file"
        self.file.write_text("text")
        self.empty = folder / "empty.txt"
        self.empty.touch()
        self.latin = folder / "latin.txt"
        self.latin.write_bytes("größer".encode("latin-1") * 1000)
        self.short = folder / "short.txt"
        self.short.write_text("short")
        self.blank = folder / "blank.txt"
        self.blank.write_text("\n \n")
        self.text = TEXT
        self.out = folder / "out"
        self.below_file = self.file / "out"
        self.below_missing = self.missing / "out.svg"
        self.trace = folder / "trace.zst"
        write_trace(self.trace, trace_of(random_experts(1, 20, layers=3)))
        self.json = folder / "broken.json"
        self.json.write_text("{")
