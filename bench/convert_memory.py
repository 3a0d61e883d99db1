"""Peak anonymous memory and speed of a conversion, seen from outside: runs the command and samples /proc.

python bench/convert_memory.py /tmp/mixtral-1 -o /tmp/out --max-workers 1 --json
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options, rest = parser.parse_known_args()
    command = [sys.executable, "-m", "converter", "convert", str(options.model), "--json", *rest]
    started_s = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.02)
    seconds = time.perf_counter() - started_s
    if process.returncode:
        sys.exit(process.returncode)
    assert process.stdout
    facts = json.load(process.stdout)
    weights = facts["source_bytes"] / 2
    result = {
        "source_bytes": facts["source_bytes"], "seconds": round(seconds, 1), "peak_anonymous_bytes": peak,
        "mweights_per_s": round(weights / seconds / 1e6, 1),
    }  # fmt: skip
    if options.json:
        print(json.dumps(result))
    else:
        print(
            f"{seconds:.0f} s, {weights / seconds / 1e6:.1f} Mweights/s, peak anonymous memory {peak / 2**20:.0f} MiB"
        )


if __name__ == "__main__":
    main()
