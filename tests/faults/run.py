"""Injects faults into conversions within a time budget: `make faults`, or `python
tests/faults/run.py [CAMPAIGN...]`.

Prints a table of the campaigns, and for each failure the command that tries its state again. Exit
code 1 if anything failed. --project tries the moe-convert of another tree of files.
"""

import argparse
import collections
import itertools
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
AT_A_TIME = 2
SHOWN = 20
"""Failures of a campaign that are printed."""


def main() -> int:
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from project_paths import SEARCH_PATH

    sys.path[:0] = SEARCH_PATH
    from faults.campaigns import CAMPAIGNS, Attempt, attempt
    from faults.campaigns.workshop import Lane, Workshop
    from faults.shim import compiler

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "campaigns",
        nargs="*",
        metavar="CAMPAIGN",
        help=f"one of {', '.join(CAMPAIGNS)} [default: all]",
    )
    parser.add_argument("--seconds", type=int, default=300, help="time in total [default: 300]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, help="try this one state")
    parser.add_argument(
        "--project",
        type=Path,
        default=ROOT,
        help="folder of the packages to try [default: this tree]",
    )
    options = parser.parse_args()
    names = options.campaigns or list(CAMPAIGNS)
    if unknown := set(names) - set(CAMPAIGNS):
        parser.error(f"unknown campaign {', '.join(sorted(unknown))}")
    if not compiler():
        print("this needs Linux and a C compiler", file=sys.stderr)
        return 2

    def campaign(name: str, lanes: list[Lane], end: float) -> tuple[list[Attempt], float]:
        """Try states until the time is over or none is left."""
        begin, numbers, lock, stop = (
            time.monotonic(),
            itertools.count(),
            threading.Lock(),
            threading.Event(),
        )

        def tries(lane: Lane) -> Iterator[Attempt]:
            while time.monotonic() < end and not stop.is_set():
                with lock:
                    number = next(numbers)
                if (result := attempt(name, options.seed, number, lane)) is None:
                    return
                yield result

        with ThreadPoolExecutor(len(lanes)) as pool:
            try:
                results = [
                    result
                    for part in pool.map(lambda lane: list(tries(lane)), lanes)
                    for result in part
                ]
            except BaseException:
                stop.set()
                raise
        return sorted(results, key=lambda result: result.number), time.monotonic() - begin

    # SIGTERM must also remove the folders in memory.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed = 0
    with (
        tempfile.TemporaryDirectory(prefix="faults-", dir=in_memory()) as folder,
        Workshop(Path(folder), options.project) as workshop,
    ):
        if options.number is not None:
            result = attempt(names[0], options.seed, options.number, workshop.lane("a"))
            print(result)
            return 1 if result and result.failure else 0
        lanes = [workshop.lane(str(number)) for number in range(AT_A_TIME)]
        prepare(lanes)
        end = time.monotonic() + options.seconds
        print("campaign         | tried | survived | failed |  time | how", flush=True)
        for position, name in enumerate(names):
            shares = [CAMPAIGNS[other][1] for other in names[position:]]
            now = time.monotonic()
            results, took = campaign(name, lanes, now + max(0, end - now) * shares[0] / sum(shares))
            bad = [result for result in results if result.failure]
            failed += len(bad)
            counts = collections.Counter(result.outcome for result in results if result.outcome)
            how = ", ".join(f"{outcome} {count}" for outcome, count in counts.most_common())
            good = len(results) - len(bad)
            print(
                f"{name:16} | {len(results):5} | {good:8} | {len(bad):6} | {took:3.0f} s | {how}",
                flush=True,
            )
            for result in bad[:SHOWN]:
                print(f"  {result.failure}")
                print(
                    f"    again: python tests/faults/run.py --seed {options.seed} --number "
                    f"{result.number} {name}"
                )
            if len(bad) > SHOWN:
                print(f"  and {len(bad) - SHOWN} more", flush=True)
    print(f"{failed} failed" if failed else "all survived")
    return 1 if failed else 0


def in_memory() -> str | None:
    """Return a file system in memory, where fsync takes no time; None if there is none."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def prepare(lanes: list) -> None:
    """Make the undisturbed conversions, and warm up each lane."""
    for case in lanes[0].workshop.cases:
        lanes[0].workshop.good(case, lanes[0])
    for lane in lanes[1:]:
        lane.warm_up()


if __name__ == "__main__":
    sys.exit(main())
