"""Experts in GPU memory: each one asynchronous copy from the RAM tier, ordered by events; the host
waits for none.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from loader.cuda.device.device import Device
from loader.cuda.experts.pinned_tier import PinnedTier, TierUse
from loader.lifetime.forks import no_gpu_after_fork


class GpuReader:
    """A `loader.experts.reader_protocol.Reader` whose buffers are GPU memory: that of
    `devices[layer]`.

    Each device has one stream for copies. A copy begins after the uses of its buffer that were
    announced by `after_use`; what comes after `before_use` begins after the copy. Nothing is ever
    written back.
    """

    def __init__(self, tier: PinnedTier, devices: Sequence[Device]) -> None:
        self.artifact = tier.artifact
        self._tier = tier
        self._devices = tuple(devices)
        streams = {
            key: device.new_stream()
            for key, device in {id(device): device for device in devices}.items()
        }
        self._streams = [streams[id(device)] for device in self._devices]
        self._slots: dict[int, Slot] = {}
        """By address of the buffer."""
        self._is_forked = False

    def in_place(self, layer: int, expert: int) -> bool:
        """Never: each has a buffer."""
        return False

    def load(self, layer: int, expert: int, buffer: Tensor | None) -> "GpuLoad":
        """Begins to bring an expert to `buffer`, uint8, in the memory of the layer's device."""
        if buffer is None:
            raise ValueError("an expert on a GPU needs a buffer")
        if self._is_forked:
            raise no_gpu_after_fork()
        slot = self._slots.get(buffer.data_ptr())
        if slot is None:
            slot = self._slots[buffer.data_ptr()] = Slot(
                self._devices[layer], self._streams[layer], buffer
            )
        return GpuLoad(
            slot, self._tier.use(layer, expert), buffer[: self.moved_bytes(layer, expert)]
        )

    def before_use(self, blobs: Iterable[Tensor]) -> None:
        """The compute stream waits for the copies that bring `blobs`; the host doesn't."""
        for blob in blobs:
            self._slots[blob.data_ptr()].before_use()

    def after_use(self, blobs: Iterable[Tensor]) -> None:
        """Copies into the buffers of `blobs` wait for what the compute stream has been given until
        now.
        """
        events: dict[int, Any] = {}
        for blob in blobs:
            slot = self._slots[blob.data_ptr()]
            stream = slot.device.compute_stream()
            event = events.get(id(slot.device))
            if event is None:
                event = events[id(slot.device)] = slot.device.new_event()
                event.record(stream)
            slot.uses[stream] = event

    def before_free(self, memory: Tensor) -> None:
        """What the compute stream is given from now on may use `memory`: torch gives freed memory
        to its stream.
        """
        begin, end = memory.data_ptr(), memory.data_ptr() + memory.numel()
        for address in [address for address in self._slots if begin <= address < end]:
            self._slots.pop(address).before_use()

    def moved_bytes(self, layer: int, expert: int) -> int:
        """An expert's bytes, over the link."""
        return self.artifact.layout(layer, expert).n_bytes

    def forget(self, layer: int, expert: int) -> None:
        """Nothing: each has a buffer."""

    def start_anew(self) -> None:
        """Makes it refuse: CUDA does not work in a forked child."""
        self._is_forked = True

    def stop(self) -> None:
        """Nothing: no read or copy takes long."""

    def close(self) -> None:
        """Waits for the copies under way and closes the tier; in a forked child it does nothing."""
        if self._is_forked:
            return
        for stream in {id(stream): stream for stream in self._streams}.values():
            stream.synchronize()
        self._tier.close()


class Slot:
    """A buffer, and what is queued that writes and uses it."""

    def __init__(self, device: Device, copies: Any, buffer: Tensor) -> None:
        self.device, self.copies = device, copies
        self.written: Any = None
        """The event after the copy that filled it, unless the host has waited for it."""
        self.uses: dict[Any, Any] = {}
        """Compute stream -> the event after the last use."""
        self._waited: set[Any] = set()
        # torch may have given memory whose last use on the compute stream is not over.
        stream = device.compute_stream()
        self.uses[stream] = device.new_event()
        self.uses[stream].record(stream)

    def copy(self, target: Tensor, source: Tensor) -> Any:
        """Queues a copy after all uses; the event after it."""
        for event in self.uses.values():
            self.copies.wait_event(event)
        self.uses.clear()
        self._waited.clear()
        self.device.copy(target, source, self.copies)
        self.written = self.device.new_event()
        self.written.record(self.copies)
        return self.written

    def before_use(self) -> None:
        """The compute stream waits for the copy, if it has not done so."""
        if (
            self.written is not None
            and (stream := self.device.compute_stream()) not in self._waited
        ):
            stream.wait_event(self.written)
            self._waited.add(stream)


class GpuLoad:
    """A `loader.experts.reader_protocol.Load`: first the file's bytes to the tier, then the tier's
    to the GPU.

    A demand is one copy that is only queued. A guess comes in pieces, each waited for, so that what
    is more urgent finds at most one piece ahead of it. `done` counts the bytes that either way has
    brought on.
    """

    def __init__(self, slot: Slot, use: TierUse, blob: Tensor) -> None:
        self._slot, self._use, self._blob = slot, use, blob
        self._copied = 0
        self._event: Any = None

    @property
    def done(self) -> int:
        """Bytes read from the file, or copied, whichever is more."""
        return max(self._use.done, self._copied)

    @property
    def remaining(self) -> int:
        """Bytes not yet copied, or given to the copy stream."""
        return self._blob.numel() - self._copied

    @property
    def at_once(self) -> bool:
        """Whether the bytes lie pinned in the tier."""
        return self._use.is_there and self._use.is_pinned

    @property
    def queued(self) -> bool:
        """Whether the host has not seen the copy end."""
        return self._event is not None

    def step(self, at_most: int | None = None) -> int:
        """Brings on one piece, from the file to the tier or from there to the GPU; without
        `at_most` all the rest.
        """
        if not self._use.is_there:
            read = self._use.step(at_most)
            if at_most is not None:
                return read
        begin, end = self._copied, self._blob.numel()
        if at_most is not None:
            end = min(end, begin + at_most)
        if begin == end:
            # A guess that was about to be dropped when it had just come, and then was right.
            return 0
        event = self._slot.copy(self._blob[begin:end], self._use.blob[begin:end])
        self._copied = end
        if at_most is None:
            self._event = event
        else:
            event.synchronize()
            self._slot.written = None
        return end - begin

    def result(self) -> Tensor:
        """The expert in its slot, for uses that come after `before_use`."""
        return self._blob

    def close(self) -> None:
        """The tier may give the bytes up, once the copy is over."""
        self._use.close(self._event)
