"""A simulated GPU: memory, streams and events on the CPU, with a check of their order.

Device memory is CPU memory. A copy runs in its stream's order, when somebody waits for it or when
`order` says so. The compute stream runs its work at once, like torch's operations in between; only
its copies to the host arrive when the host waits. Vector clocks (happens_before.py) decide if two
accesses are ordered; the order in which they ran does not.
"""

import random
import threading
import weakref
from collections import deque

import numpy
import torch
from cuda_host import launch_on_host
from happens_before import Access, HappensBefore

HOST = "host"
ALIGNMENT_BYTES = 256


class RecordingDevice:
    """A `loader.cuda.device.device.Device` that raises AssertionError for races.

    A race is two conflicting accesses that no event, stream or synchronization orders. `races`
    keeps them, for threads that catch the error.

    order: when copies run: "late" (when somebody waits), "early" (at once), or a seed for a random
    mixture. capacity_bytes: size of its memory. pinnable_bytes: limit of `pin`. beside: another
    device of the same machine.

    log: ("copy" | "launch" | "pin" | "wait", name or bytes) in the order of the calls.
    synchronisations: (thread name, event or stream) of each wait of the host. copied_bytes: bytes
    copied to the device, and to the host.
    """

    def __init__(
        self,
        *,
        order="late",
        capacity_bytes=1 << 40,
        pinnable_bytes=1 << 60,
        name="cuda:0",
        beside=None,
    ):
        self.name, self.torch_device, self.capability = name, torch.device("cpu"), (7, 5)
        self.order = order
        self.capacity_bytes, self.used_bytes, self.pinnable_bytes = (
            capacity_bytes,
            0,
            pinnable_bytes,
        )
        self.log, self.synchronisations = [], []
        self.copied_bytes = {"to device": 0, "to host": 0}
        self.thread_order = 0
        """Order of a kernel's threads (tests/support/gpu/cuda_host.py)."""
        self._random = random.Random(order)
        self.machine = beside.machine if beside else Machine()
        self.lock = self.machine.lock
        self._streams = []
        self._memory, self._freed = {}, deque()
        self._compute = self._add_stream("compute", eager=True)

    @property
    def races(self):
        """All races of this machine."""
        return self.machine.order.races

    # The `Device` protocol.

    def empty(self, n_bytes):
        with self.lock:
            self._reclaim()
            size = -(-n_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            if self.used_bytes + size > self.capacity_bytes:
                raise torch.OutOfMemoryError(
                    f"{self.name}: {size} bytes, {self.used_bytes} are in use"
                )
            array = numpy.full(size + ALIGNMENT_BYTES, 0xA5, numpy.uint8)
            # numpy may return the address of memory that was just freed.
            self._reclaim()
            begin = -(-array.ctypes.data // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            self._memory[begin] = begin + size
            self.used_bytes += size
            weakref.finalize(array, self._let_go, begin, begin + size)
            # torch may return memory that the compute stream still uses.
            self.machine.order.access(
                self._compute.name, "an earlier use of the memory", begin, begin + size, write=True
            )
            return torch.from_numpy(array)[begin - array.ctypes.data :][:n_bytes]

    def memory(self):
        with self.lock:
            self._reclaim()
            return self.capacity_bytes - self.used_bytes, self.capacity_bytes

    def release(self):
        pass

    def new_stream(self):
        with self.lock:
            return self._add_stream(f"copy-{len(self._streams)}", eager=False)

    def compute_stream(self):
        return self._compute

    def new_event(self):
        return RecordingEvent(self)

    def copy(self, target, source, stream):
        assert target.dtype == source.dtype == torch.uint8 and target.numel() == source.numel()
        with self.lock:
            self._reclaim()
            to_device = self._is_mine(target)
            assert to_device or self._is_mine(source), "a copy on the host"
            name = self.machine.number(
                f"copy of {target.numel()} bytes {'to the device' if to_device else 'to the host'}"
            )
            self.log.append(("copy", target.numel()))
            self.copied_bytes["to device" if to_device else "to host"] += target.numel()
            self._given(stream, name, reads=[source], writes=[target])
            host = source if to_device else target
            if not (self._is_mine(source) and to_device) and not self.machine.is_pinned(host):
                stream.run_until(stream.given)
                target.copy_(source)
                self.host_waited(f"pageable {name}", self.machine.order.point(stream.name))
            elif stream.eager and to_device:
                stream.run_until(stream.given)
                target.copy_(source)
            else:
                # The compute stream continues at once: copy the present content.
                stream.give(target, source.clone() if stream.eager else source)
            self._chance()

    def pin(self, memory):
        with self.lock:
            assert memory.data_ptr() % 4096 == memory.numel() % 4096 == 0, "no whole pages"
            if memory.numel() > self.pinnable_bytes:
                return False
            self.pinnable_bytes -= memory.numel()
            self.log.append(("pin", memory.numel()))
            self.machine.pin(memory)
            return True

    def unpin(self, memory):
        with self.lock:
            self.pinnable_bytes += memory.numel()
            self.machine.unpin(memory)

    def prepare(self, kernel, grid, threads, args, *, shared_bytes=0, reads=(), writes=()):
        def launch():
            self.touch(kernel, reads=reads, writes=writes)
            with self.lock:
                launch_on_host(kernel, grid, threads, args, shared_bytes, self.thread_order)

        return launch

    def launch(self, kernel, grid, threads, args, *, shared_bytes=0, reads=(), writes=()):
        self.prepare(
            kernel, grid, threads, args, shared_bytes=shared_bytes, reads=reads, writes=writes
        )()

    # For tests.

    def touch(self, name="use", *, reads=(), writes=()):
        """Record a launch on the compute stream that computes nothing."""
        with self.lock:
            self._reclaim()
            self.log.append(("launch", name))
            self._given(self._compute, self.machine.number(name), reads, writes)
            self._chance()

    def host_writes(self, memory, name="host"):
        """Record that the host will write to `memory`."""
        self._host_accesses(memory, name, write=True)

    def host_reads(self, memory, name="host"):
        """Record that the host will read `memory`."""
        self._host_accesses(memory, name, write=False)

    def syncs_of(self, thread="MainThread"):
        """Return the events and streams that the thread waited for."""
        return [what for name, what in self.synchronisations if name == thread]

    # Inside.

    def _add_stream(self, name, *, eager):
        stream = RecordingStream(self, f"{self.name} {name}", eager)
        self._streams.append(stream)
        return stream

    def _given(self, stream, name, reads, writes):
        order = self.machine.order
        order.see(stream.name, order.point(HOST))
        for memory, write in [*((m, False) for m in reads), *((m, True) for m in writes)]:
            begin = memory.data_ptr()
            keep = None if self._is_mine(memory) else memory
            order.access(
                stream.name,
                name,
                begin,
                begin + memory.numel() * memory.element_size(),
                write=write,
                memory=keep,
            )

    def _host_accesses(self, memory, name, *, write):
        with self.lock:
            self._reclaim()
            begin = memory.data_ptr()
            end = begin + memory.numel() * memory.element_size()
            self.machine.order.access(
                HOST, self.machine.number(name), begin, end, write=write, memory=memory
            )

    def host_waited(self, what, point):
        """Record that the host waited until `point`."""
        self.synchronisations.append((threading.current_thread().name, what))
        self.machine.order.see(HOST, point)

    def _chance(self):
        for stream in self._streams:
            if self.order == "early":
                stream.run_until(stream.given)
            elif self.order != "late" and self._random.random() < 0.3:
                stream.run_until(self._random.randint(stream.done, stream.given))

    def _is_mine(self, memory):
        address = memory.data_ptr()
        return any(begin <= address < end for begin, end in self._memory.items())

    def _let_go(self, begin, end):
        # Runs wherever the last reference is dropped, even within another call, so the next call
        # checks it. torch may use the memory for later work of the compute stream.
        order = self.machine.order
        self._freed.append((begin, end, order.joined(self._compute.name, HOST)))

    def _reclaim(self):
        while self._freed:
            begin, end, clock = self._freed.popleft()
            del self._memory[begin]
            self.used_bytes -= end - begin
            order = self.machine.order
            try:
                order.check(
                    Access(self._compute.name, 0, "the memory's next use", True, begin, end, None),
                    clock,
                )
            finally:
                order.forget(begin, end)


class Machine:
    """State that devices share: the host, its pinned memory, the clocks."""

    def __init__(self):
        self.lock = threading.RLock()
        self.order = HappensBefore()
        self._pinned = {}
        self._count = 0

    def number(self, name):
        self._count += 1
        return f"{name} #{self._count}"

    def pin(self, memory):
        assert memory.data_ptr() not in self._pinned, "pinned twice"
        self._pinned[memory.data_ptr()] = memory

    def unpin(self, memory):
        del self._pinned[memory.data_ptr()]

    def is_pinned(self, memory):
        begin, end = memory.data_ptr(), memory.data_ptr() + memory.numel()
        return any(at <= begin and end <= at + whole.numel() for at, whole in self._pinned.items())


class RecordingStream:
    """A stream. given: number of queued operations. done: number of those that ran."""

    def __init__(self, device, name, eager):
        self.device, self.name, self.eager = device, name, eager
        self.given = self.done = 0
        self._queue = deque()

    def give(self, target, source):
        """Queue a copy."""
        self.given += 1
        self._queue.append(lambda: target.copy_(source))

    def wait_event(self, event):
        with self.device.lock:
            assert event.stream is not None, (
                f"{self.name} waits for an event that was never recorded"
            )
            self.device.log.append(("wait", self.name))
            self.device.machine.order.see(self.name, event.point)
            if self.eager:
                event.stream.run_until(event.after)
            else:
                self.given += 1
                self._queue.append(
                    lambda stream=event.stream, after=event.after: stream.run_until(after)
                )

    def synchronize(self):
        with self.device.lock:
            self.run_until(self.given)
            self.device.host_waited(self.name, self.device.machine.order.point(self.name))

    def run_until(self, count):
        """Run queued operations until `count` are done."""
        while self.done < count:
            self.done += 1
            self._queue.popleft()()


class RecordingEvent:
    """An event. stream: where it was last recorded. after, point: its place there.

    after counts the stream's operations; point is a vector clock.
    """

    def __init__(self, device):
        self._device = device
        self.stream, self.after, self.point = None, 0, {}

    def record(self, stream):
        with self._device.lock:
            order = self._device.machine.order
            order.see(stream.name, order.point(HOST))
            self.stream, self.after, self.point = stream, stream.given, order.point(stream.name)

    def query(self):
        with self._device.lock:
            if self.stream is None:
                return True
            self._device._chance()
            if self.stream.done < self.after:
                return False
            self._device.machine.order.see(HOST, self.point)
            return True

    def synchronize(self):
        with self._device.lock:
            assert self.stream is not None, "the host waits for an event that was never recorded"
            self.stream.run_until(self.after)
            self._device.host_waited(f"event on {self.stream.name}", self.point)
