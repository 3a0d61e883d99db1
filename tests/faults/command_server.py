"""Runs moe-convert in a forked child for each line of standard input, with calls of the C library that fail (shim.c).

A line is JSON: arguments, rules (for faults_set), and the file for what the child prints. Prints, as JSON, the child's
exit code and how many calls failed. Imports torch once and never computes in the parent, so a fork is safe.
"""

import ctypes
import json
import os
import sys

import converter.convert  # noqa: F401
from converter.cli.main import main

shim = ctypes.CDLL(None)
shim.faults_set.argtypes = [ctypes.c_char_p]
shim.faults_hits.restype = ctypes.c_long


def run(arguments: list[str], rules: str, output: str) -> int:
    """The exit code of moe-convert, in this process."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    assert shim.faults_set(rules.encode()) >= 0, rules
    try:
        main(arguments)
    except SystemExit as e:
        return int(e.code or 0)
    return 0


for line in sys.stdin:
    task = json.loads(line)
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        code = 70
        try:
            code = run(task["arguments"], task["rules"], task["output"])
        finally:
            os.write(write_end, str(shim.faults_hits()).encode())
            os._exit(code)
    os.close(write_end)
    with os.fdopen(read_end) as answer:
        failed = int(answer.read() or 0)
    print(json.dumps([os.waitstatus_to_exitcode(os.wait()[1]), failed]), flush=True)
