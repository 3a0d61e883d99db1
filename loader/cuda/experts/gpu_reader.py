"""The reader of GPU slots: asynchronous copies from the RAM tier, ordered by events."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from loader.cuda.device.device import Device
from loader.cuda.experts.pinned_tier import PinnedTier
from loader.cuda.experts.tier_use import TierUse
from loader.lifetime.forks import no_gpu_after_fork


class GpuReader:
    """A `loader.experts.reader_protocol.Reader` whose buffers are GPU memory of `devices[layer]`.

    Each GPU has one stream for copies. A copy into a buffer begins after the uses that `after_use`
    announced. Work that follows `before_use` begins after the copy. Nothing is written back.
    """

    def __init__(self, tier: PinnedTier, devices: Sequence[Device]) -> None:
        self.artifact = tier.artifact
        self._tier = tier
        self._devices = tuple(devices)
        different = {id(device): device for device in devices}
        streams = {key: device.new_stream() for key, device in different.items()}
        self._streams = [streams[id(device)] for device in self._devices]
        self._slots: dict[int, Slot] = {}
        """Slot by address of its buffer."""
        self._is_forked = False

    def in_place(self, layer: int, expert: int) -> bool:
        """Return False: every expert needs a buffer."""
        return False

    def load(self, layer: int, expert: int, buffer: Tensor | None) -> "GpuLoad":
        """Begin to load an expert. buffer: uint8, on the layer's GPU.

        Raises MoeConvertError in a forked child.
        """
        if buffer is None:
            raise ValueError("an expert on a GPU needs a buffer")
        if self._is_forked:
            raise no_gpu_after_fork()
        slot = self._slots.get(buffer.data_ptr())
        if slot is None:
            slot = Slot(self._devices[layer], self._streams[layer], buffer)
            self._slots[buffer.data_ptr()] = slot
        use = self._tier.use(layer, expert)
        return GpuLoad(slot, use, buffer[: self.moved_bytes(layer, expert)])

    def before_use(self, blobs: Iterable[Tensor]) -> None:
        """Make the compute stream wait for the copies that fill `blobs`. The host does not wait."""
        for blob in blobs:
            self._slots[blob.data_ptr()].before_use()

    def after_use(self, blobs: Iterable[Tensor]) -> None:
        """Make later copies into `blobs` wait for the work that the compute stream has now."""
        events: dict[int, Any] = {}
        for blob in blobs:
            slot = self._slots[blob.data_ptr()]
            stream = slot.device.compute_stream()
            event = events.get(id(slot.device))
            if event is None:
                event = slot.device.new_event()
                events[id(slot.device)] = event
                event.record(stream)
            slot.uses[stream] = event

    def before_free(self, memory: Tensor) -> None:
        """Forget the slots in `memory`, and order later work of the compute stream after copies.

        torch gives freed memory to the compute stream again.
        """
        begin = memory.data_ptr()
        end = begin + memory.numel()
        for address in [address for address in self._slots if begin <= address < end]:
            self._slots.pop(address).before_use()

    def moved_bytes(self, layer: int, expert: int) -> int:
        """Return the size of the expert, which crosses the link whole, in bytes."""
        return self.artifact.layout(layer, expert).n_bytes

    def forget(self, layer: int, expert: int) -> None:
        """Do nothing: no expert is used in place."""

    def start_anew(self) -> None:
        """Refuse all loads from now on: CUDA does not work in a forked child."""
        self._is_forked = True

    def stop(self) -> None:
        """Do nothing: no read or copy takes long."""

    def close(self) -> None:
        """Wait for running copies and close the tier. Does nothing in a forked child."""
        if self._is_forked:
            return
        for stream in {id(stream): stream for stream in self._streams}.values():
            stream.synchronize()
        self._tier.close()


class Slot:
    """A buffer in GPU memory, with the events of its copies and uses.

    copies: the stream for copies.
    """

    def __init__(self, device: Device, copies: Any, buffer: Tensor) -> None:
        self.device = device
        self._copies = copies
        self.written: Any = None
        """Event after the copy that filled the buffer; None once the host has waited for it."""
        self.uses: dict[Any, Any] = {}
        """Event after the last use, by compute stream."""
        self._waited: set[Any] = set()
        """Compute streams that wait for `written` already."""
        # torch may return memory that the compute stream still uses.
        stream = device.compute_stream()
        self.uses[stream] = device.new_event()
        self.uses[stream].record(stream)

    def copy(self, target: Tensor, source: Tensor) -> Any:
        """Queue a copy after all uses, and return the event after it."""
        for event in self.uses.values():
            self._copies.wait_event(event)
        self.uses.clear()
        self._waited.clear()
        self.device.copy(target, source, self._copies)
        self.written = self.device.new_event()
        self.written.record(self._copies)
        return self.written

    def before_use(self) -> None:
        """Make the compute stream wait for the copy, unless it does so already."""
        if self.written is None:
            return
        stream = self.device.compute_stream()
        if stream not in self._waited:
            stream.wait_event(self.written)
            self._waited.add(stream)


class GpuLoad:
    """A `loader.experts.reader_protocol.Load`: from the file to the tier, from there to the GPU.

    A demand only queues one copy. A prefetch copies in pieces and waits for each, so that a demand
    finds at most one piece ahead of it.
    """

    def __init__(self, slot: Slot, use: TierUse, blob: Tensor) -> None:
        self._slot = slot
        self._use = use
        self._blob = blob
        self._copied = 0
        self._event: Any = None

    @property
    def done(self) -> int:
        """Bytes read from the file, or bytes copied, whichever is more."""
        return max(self._use.done, self._copied)

    @property
    def remaining(self) -> int:
        """Bytes that are neither copied nor queued."""
        return self._blob.numel() - self._copied

    @property
    def at_once(self) -> bool:
        """True if the tier has the expert in page-locked memory."""
        return self._use.has_bytes and self._use.is_pinned

    @property
    def queued(self) -> bool:
        """True if the host has not waited for the copy."""
        return self._event is not None

    def step(self, at_most: int | None = None) -> int:
        """Move one piece, from the file to the tier or from there to the GPU; None: all the rest.

        Returns the bytes of that move.
        """
        if not self._use.has_bytes:
            read = self._use.step(at_most)
            if at_most is not None:
                return read
        begin = self._copied
        end = self._blob.numel()
        if at_most is not None:
            end = min(end, begin + at_most)
        if begin == end:
            # A prefetch that was cancelled as it ended, and then promoted.
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
        """Return the expert in its slot, uint8 [n_bytes], for use after `Reader.before_use`."""
        return self._blob

    def close(self) -> None:
        """End the use of the tier when the copy is over."""
        self._use.close(self._event)
