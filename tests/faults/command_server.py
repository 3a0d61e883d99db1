"""Run moe-convert in a forked child for each line of standard input, with calls of the C library
that fail, kill it, or are logged (shim.c).

A line is JSON: the fields of `Task`. The answer is JSON: the child's exit code (minus the signal
that killed it), the number of calls with a fault, and true if the child took too long. The parent
imports the modules of commands once and never computes, so a fork is safe.
"""

import contextlib
import ctypes
import importlib
import json
import os
import resource
import select
import signal
import sys
import traceback
from dataclasses import dataclass

# Of an editable install; PYTHONPATH says which tree is tried.
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]

import transformers.models.mixtral.modeling_mixtral  # noqa: E402, F401

import converter.convert  # noqa: E402, F401
from converter.cli.main import main  # noqa: E402

MEGABYTES = 8192
"""That a child may allocate."""

shim = ctypes.CDLL(None)
shim.faults_set.argtypes = [ctypes.c_char_p]
shim.faults_log.argtypes = [ctypes.c_char_p, ctypes.c_int]
shim.faults_hits.restype = ctypes.c_long


@dataclass(frozen=True)
class Task:
    """A command to run.

    arguments: arguments of moe-convert. rules: rules for faults_set. output: file for stdout and
    stderr. log, logged: file and paths for faults_log; none if empty. kill_after_s: None for no
    kill. seconds: time limit. modules: file for the names of imported modules; none if empty.
    """

    arguments: list[str]
    rules: str
    output: str
    log: str
    logged: str
    kill_after_s: float | None
    seconds: float
    modules: str


def run(task: Task) -> int:
    """Run moe-convert in this process, and return its exit code."""
    descriptor = os.open(task.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    resource.setrlimit(resource.RLIMIT_DATA, (MEGABYTES << 20, MEGABYTES << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if task.log:
        log = os.open(task.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        shim.faults_log(task.logged.encode(), log)
    assert shim.faults_set(task.rules.encode()) >= 0, task.rules
    try:
        main(task.arguments)
    except SystemExit as e:
        return int(e.code or 0)
    return 0


def in_child(task: Task, write_end: int) -> None:
    code = 70
    try:
        code = run(task)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        struck = shim.faults_hits()
        shim.faults_set(b"")
        shim.faults_log(b"", -1)
        os.write(write_end, str(struck).encode())
        if task.modules:
            with open(task.modules, "w") as f:
                json.dump(list(sys.modules), f)
        os._exit(code)


def waited(pid: int, task: Task) -> bool:
    """Wait for a child, or kill it. False if it exceeded its time limit."""
    handle = os.pidfd_open(pid)
    try:
        ended, limit = (
            select.poll(),
            task.seconds if task.kill_after_s is None else task.kill_after_s,
        )
        ended.register(handle, select.POLLIN)
        if ended.poll(limit * 1000):
            return True
        os.kill(pid, signal.SIGKILL)
        return task.kill_after_s is not None
    finally:
        os.close(handle)


for line in sys.stdin:
    task = Task(**json.loads(line))
    read_end, write_end = os.pipe()
    if (pid := os.fork()) == 0:
        os.close(read_end)
        in_child(task, write_end)
    os.close(write_end)
    in_time = waited(pid, task)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with os.fdopen(read_end) as answer:
        struck = int(answer.read() or 0)
    if task.modules:
        with open(task.modules) as f:
            for name in json.load(f):
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
    print(json.dumps([code, struck, not in_time]), flush=True)
