"""Experts of any size without files, each with other bytes, and a GPU's cache over them."""

import threading
from types import SimpleNamespace

import torch
from recording_device import RecordingDevice

from formats.reading.reader import ExpertReader
from loader.cuda.experts.gpu_reader import GpuReader
from loader.cuda.experts.pinned_tier import PinnedTier
from loader.experts.buffers import Memory, buffer_bytes
from loader.experts.cache import ExpertCache
from loader.experts.policy import LrfuPolicy

EXPERT_BYTES = 16384


def pattern(layer, expert, n_bytes):
    """Return the bytes of an expert."""
    generator = torch.Generator().manual_seed(1000 * layer + expert)
    return torch.randint(256, (n_bytes,), dtype=torch.uint8, generator=generator)


class PatternReader(ExpertReader):
    """A reader of generated experts.

    sizes: expert size of each layer, in bytes. device: records the host's writes. asked: (layer,
    expert, begin, end) of each read. hook: called with (layer, expert) before each read; its
    exceptions become the read's.
    """

    def __init__(self, sizes, experts, device, top_k=2):
        entries = {size: SimpleNamespace(length=size, codec="none", offset=0) for size in sizes}
        layouts = {size: SimpleNamespace(n_bytes=size) for size in sizes}
        super().__init__(
            SimpleNamespace(
                architecture=SimpleNamespace(
                    num_local_experts=experts, expert_layers=len(sizes), num_experts_per_tok=top_k
                ),
                folder="made up",
                layout=lambda layer, expert: layouts[sizes[layer]],
                entry=lambda layer, expert: entries[sizes[layer]],
            ),
            check="none",
        )
        self.asked, self.closed = [], False
        self.hook = lambda layer, expert: None
        self._device = device
        self._patterns = {
            (layer, expert): pattern(layer, expert, size)
            for layer, size in enumerate(sizes)
            for expert in range(experts)
        }

    def in_place(self, layer, expert):
        return False

    def name(self, layer, expert):
        return f"layer {layer} expert {expert}"

    def place(self, layer, expert, buffer):
        return buffer

    def fetch(self, layer, expert, place, begin, end):
        self.hook(layer, expert)
        self.asked.append((layer, expert, begin, end))
        self._device.host_writes(place[begin:end], f"read of layer {layer} expert {expert}")
        place[begin:end] = self._patterns[layer, expert][begin:end]

    def close(self):
        self.closed = True


class GpuCache:
    """A model's expert cache on GPUs, over `RecordingDevice`s.

    sizes: expert size of each layer, in bytes. ram: experts of each size in the tier; None: all.
    devices: number of GPUs, which share the layers evenly.
    """

    def __init__(
        self,
        slots,
        *,
        layers=4,
        experts=8,
        sizes=None,
        ram=None,
        order="late",
        devices=1,
        staging=2,
        policy=LrfuPolicy,
        piece_buffers=3,
        top_k=2,
        **of_device,
    ):
        sizes = sizes or [EXPERT_BYTES] * layers
        first = RecordingDevice(order=order, **of_device)
        self.devices = [first] + [
            RecordingDevice(order=order, name=f"cuda:{n}", beside=first, **of_device)
            for n in range(1, devices)
        ]
        self.device = first
        self.reader = PatternReader(sizes, experts, first, top_k)
        self.counts = {size: ram or sizes.count(size) * experts for size in sizes}
        self.tier = PinnedTier(
            self.reader, self.counts, first.pin, first.unpin, piece_bytes=piece_buffers * max(sizes)
        )
        self.of_layer = [self.devices[layer * devices // len(sizes)] for layer in range(len(sizes))]
        memories = {
            id(d): Memory(d.empty, piece_buffers * buffer_bytes(max(sizes))) for d in self.devices
        }
        self.gpu_reader = GpuReader(self.tier, self.of_layer)
        self.cache = ExpertCache(
            self.gpu_reader,
            slots,
            staging=staging,
            policy=policy,
            memory=[memories[id(d)] for d in self.of_layer],
            tier=self.tier,
        )
        self._patterns = self.reader._patterns
        self._use = threading.Lock()

    def use(self, layer, blobs):
        """Record a launch that uses the experts. AssertionError if their bytes are wrong."""
        with self._use:
            self.of_layer[layer].touch(
                f"layer {layer} experts {list(blobs)}", reads=list(blobs.values())
            )
            for expert, blob in blobs.items():
                assert torch.equal(blob, self._patterns[layer, expert]), (
                    f"layer {layer} expert {expert}: other bytes"
                )

    def token(self, layer, experts, guess=()):
        """Use a token's experts of a layer, and prefetch `guess` for the next layer meanwhile."""
        with self.cache.lease(layer, experts) as lease:
            if guess:
                self.cache.guess(layer + 1, guess)
            for blobs in lease.parts():
                self.use(layer, blobs)

    def prompt(self, layer, experts, ascending=False):
        """Use a prompt's experts of a layer, and return the experts of each part."""
        parts = []
        for blobs in self.cache.stream(layer, experts, (), ascending=ascending):
            self.use(layer, blobs)
            parts.append(list(blobs))
        return parts

    def check_counts(self):
        """Check the invariants that hold while no read, copy or use runs."""
        cache, tier = self.cache, self.tier
        cache._monitor.wait_for(
            lambda: not any(h.job for s in cache._layers for h in s.entries()) or None, timeout_s=60
        )
        with cache._monitor.lock:
            for side in {id(slots.staging): slots.staging for slots in cache._layers}.values():
                users = [slots for slots in cache._layers if slots.staging is side]
                assert side.used == sum(len(slots.staged) for slots in users)
                in_use = side.used + sum(len(slots.cached) for slots in users)
                count = sum(piece.count for piece in side.pool.pieces)
                assert count == sum(slots.slots for slots in users) + side.room
                assert sum(len(piece.free) for piece in side.pool.pieces) == count - in_use
            assert all(len(s.cached) <= s.slots for s in cache._layers)
            assert not any(h.pins for s in cache._layers for h in s.cached.values())
        for device in self.devices:
            device.compute_stream().synchronize()
        for stream in {id(s): s for s in self.gpu_reader._streams}.values():
            stream.synchronize()
        contents = tier._contents
        with contents.lock:
            contents.end_copies()
            assert not contents._copies
            assert not any(entry.users for entry in contents._entries.values())
            assert all(entry.blob is not None for entry in contents._entries.values())
        for device in self.devices:
            # This call also checks memory that was freed meanwhile.
            device.memory()
        assert not self.device.races
