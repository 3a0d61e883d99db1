"""Fuzzes the parsers within a time budget: `make fuzz`, or `python tests/fuzz/run.py --seconds N
[TARGET...]`.

Two targets run at a time, each in its own process with a limit on memory and on the time of one
input. An input that raises anything but our own errors, or exceeds a limit, is kept in
tests/fuzz/found/TARGET. Fix the parser and commit the file: tests/formats/test_fuzz_corpus.py tries
it from then on. `--input FILE TARGET` tries one file.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOUND = HERE / "found"
SECONDS_OF_ONE_INPUT = 10
MEGABYTES = 2048
AT_A_TIME = 2


def main() -> int:
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from project_paths import SEARCH_PATH

    sys.path[:0] = SEARCH_PATH
    from fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "targets", nargs="*", metavar="TARGET", help=f"one of {', '.join(TARGETS)} [default: all]"
    )
    parser.add_argument("--seconds", type=int, default=60, help="time in total [default: 60]")
    parser.add_argument("--input", type=Path, help="try this file instead")
    options = parser.parse_args()
    names = options.targets or list(TARGETS)
    if unknown := set(names) - set(TARGETS):
        parser.error(f"unknown target {', '.join(sorted(unknown))}")
    if options.input:
        with tempfile.TemporaryDirectory() as scratch:
            accepted = TARGETS[names[0]](Path(scratch)).run(options.input.read_bytes())
        print("accepted" if accepted else "refused, as it should be")
        return 0
    if importlib.util.find_spec("atheris") is None:
        print(
            "fuzzing needs atheris, which has wheels for Linux on x86-64: pip install -e .[fuzz]",
            file=sys.stderr,
        )
        return 2
    seconds = max(1, options.seconds * AT_A_TIME // len(names))
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        failed = [
            name
            for name, good in zip(names, pool.map(lambda n: fuzz(n, seconds), names), strict=True)
            if not good
        ]
    print(
        f"{len(names) - len(failed)} passed, {len(failed)} failed"
        + (f": {', '.join(failed)}" if failed else "")
    )
    return 1 if failed else 0


def fuzz(name: str, seconds: int) -> bool:
    """Fuzz one target; keep its crashing inputs, and print the end of the output after a crash."""
    from project_paths import SEARCH_PATH

    with tempfile.TemporaryDirectory(prefix=f"fuzz-{name}-") as folder:
        kept = Path(folder) / "kept"
        kept.mkdir()
        options = (
            f"-max_total_time={seconds}",
            f"-timeout={SECONDS_OF_ONE_INPUT}",
            f"-rss_limit_mb={MEGABYTES}",
            f"-artifact_prefix={kept}/",
            "-max_len=65536",
        )
        run = subprocess.run(
            [sys.executable, "-m", "fuzz.engine", name, str(Path(folder) / "run"), *options],
            capture_output=True,
            text=True,
            errors="replace",
            env=os.environ | {"PYTHONPATH": os.pathsep.join(SEARCH_PATH)},
            timeout=seconds * 3 + 120,
        )
        for file in kept.iterdir():
            (FOUND / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, FOUND / name / file.name)
            print(f"{name}: kept {(FOUND / name / file.name).relative_to(ROOT)}")
        if run.returncode:
            print(f"{name}: exit {run.returncode}\n{run.stderr[-6000:]}")
        else:
            print(
                f"{name}: "
                f"{next(x for x in reversed(run.stderr.splitlines()) if x.startswith('Done'))}"
            )
        return run.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
