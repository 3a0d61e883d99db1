"""A reader without files for tests of the cache; the test decides when a read ends.

The bytes of an expert are one byte: its number.
"""

import threading
from types import SimpleNamespace

from formats.errors import DamageError

EXPERT_BYTES = 8192


class SlowReader:
    """Records reads in `asked`. With `held`, each step waits for `let`.

    fails: (layer, expert) whose reads raise DamageError.
    """

    def __init__(self, layers=8, experts=8, held=False):
        layout = SimpleNamespace(n_bytes=EXPERT_BYTES)
        entry = SimpleNamespace(length=EXPERT_BYTES)
        self.artifact = SimpleNamespace(
            architecture=SimpleNamespace(num_local_experts=experts, expert_layers=layers),
            layout=lambda layer, expert: layout,
            entry=lambda layer, expert: entry,
        )
        self.asked = []
        self.fails = set()
        self.buffers = set()
        self.closed = False
        self._held = held
        self._turns = {}
        self._lock = threading.Condition()

    def in_place(self, layer, expert):
        return False

    def load(self, layer, expert, buffer):
        self.buffers.add(buffer.data_ptr())
        return SlowLoad(self, layer, expert, buffer)

    def moved_bytes(self, layer, expert):
        return EXPERT_BYTES

    def before_use(self, blobs):
        pass

    def after_use(self, blobs):
        pass

    def before_free(self, memory):
        pass

    def forget(self, layer, expert):
        pass

    def let(self, layer, expert, steps=100):
        """Let the reads of an expert take `steps` more steps."""
        with self._lock:
            self._turns[layer, expert] = self._turns.get((layer, expert), 0) + steps
            self._lock.notify_all()

    def turn(self, layer, expert):
        with self._lock:
            self.asked.append((layer, expert))
            self._lock.notify_all()
            if self._held:
                assert self._lock.wait_for(
                    lambda: self._turns.get((layer, expert), 0) > 0, timeout=60
                )
                self._turns[layer, expert] -= 1

    def wait_until_asked(self, layer, expert, times=1):
        with self._lock:
            assert self._lock.wait_for(
                lambda: self.asked.count((layer, expert)) >= times, timeout=60
            )

    def start_anew(self):
        self._lock = threading.Condition()

    def stop(self):
        pass

    def close(self):
        self.closed = True


class SlowLoad:
    """A load of two steps if it is a guess, of one if it is not."""

    at_once = queued = False

    def __init__(self, reader, layer, expert, buffer):
        self._reader, self._layer, self._expert, self._buffer = reader, layer, expert, buffer
        self.done = 0

    @property
    def remaining(self):
        return EXPERT_BYTES - self.done

    def step(self, at_most=None):
        self._reader.turn(self._layer, self._expert)
        if (self._layer, self._expert) in self._reader.fails:
            raise DamageError(f"layer {self._layer} expert {self._expert}: cut")
        self.done = (
            EXPERT_BYTES if at_most is None else min(EXPERT_BYTES, self.done + EXPERT_BYTES // 2)
        )

    def result(self):
        self._buffer[0] = self._expert
        return self._buffer[:1]

    def close(self):
        pass
