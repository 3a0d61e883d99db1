"""Calls in forked children."""

import faulthandler
import os
import pickle
import select
import signal
import tempfile

import pytest

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


def in_child(call, timeout_s=60):
    """Return the result of `call` in a forked child, or the error that it raises.

    AssertionError if the child dies, or hangs for `timeout_s`; its message shows the stacks of the
    child's threads.
    """
    read, write = os.pipe()
    with tempfile.TemporaryFile("w+") as stacks:
        # Before the fork: hooks that run in the child inside os.fork can hang too. The signal
        # writes the stacks, then ends the process.
        faulthandler.register(signal.SIGUSR1, file=stacks, chain=True)
        pid = os.fork()
        if pid == 0:
            _answer(call, write)
        os.close(write)
        try:
            is_answered = select.select([read], [], [], timeout_s)[0]
            data = os.read(read, 1 << 20) if is_answered else b""
        finally:
            os.kill(pid, signal.SIGUSR1)
            _, status = os.waitpid(pid, 0)
            faulthandler.unregister(signal.SIGUSR1)
            os.close(read)
        stacks.seek(0)
        assert is_answered, f"the child hangs:\n{stacks.read()}"
        assert data, f"the child died without an answer, status {status}"
    return pickle.loads(data)


def _answer(call, write):
    """Write the pickled result of `call`, or its error, and end the process."""
    try:
        try:
            result = call()
        except BaseException as e:
            result = e
        os.write(write, pickle.dumps(result))
    finally:
        os._exit(0)
