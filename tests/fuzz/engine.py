"""Fuzzes one target with atheris, which is coverage-guided: `python -m fuzz.engine TARGET FOLDER
[libFuzzer options]`.

FOLDER gets the corpus and the scratch files. fuzz.run starts this and sets the time.
"""

import sys
from pathlib import Path

import atheris

# The finder of an editable install would load our packages without the instrumentation.
sys.meta_path = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
with atheris.instrument_imports(
    include=["formats", "converter", "loader"], enable_loader_override=True
):
    from fuzz.targets import TARGETS, mutate_json


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    (folder / "scratch").mkdir(parents=True)
    (folder / "corpus").mkdir()
    target = TARGETS[name](folder / "scratch")
    for number, data in enumerate(target.corpus):
        (folder / "corpus" / f"{number:03d}").write_bytes(data)

    def one(data: bytes) -> None:
        target.run(data)

    def mutated(data: bytes, max_size: int, seed: int) -> bytes:
        begin = data[: target.prefix_bytes]
        # A trace and a journal are lines, of which the first is JSON.
        line, newline, rest = data[len(begin) :].partition(b"\n")
        found = mutate_json(line, seed) if seed % 3 else None
        if found is None:
            return atheris.Mutate(data, max_size)
        return (begin + found + newline + rest)[:max_size]

    atheris.Setup([sys.argv[0], *sys.argv[3:], str(folder / "corpus")], one, custom_mutator=mutated)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
