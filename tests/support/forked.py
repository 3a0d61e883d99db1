"""What a forked child makes of what its parent has."""

import os
import pickle
import select
import signal

import pytest

needs_fork = pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="no fork")


def in_child(call):
    """What `call` gives in a forked child, or the error that it raises; AssertionError after a
    minute.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            try:
                result = call()
            except BaseException as e:
                result = e
            os.write(write, pickle.dumps(result))
        finally:
            os._exit(0)
    try:
        assert select.select([read], [], [], 60)[0], "the child hangs"
        return pickle.loads(os.read(read, 1 << 20))
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)
        os.close(write)
