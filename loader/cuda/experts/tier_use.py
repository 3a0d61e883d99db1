"""A claim on one expert of the tier."""

from torch import Tensor

from loader.cuda.device.device import Event
from loader.cuda.experts.tier_contents import TierContents
from loader.cuda.experts.tier_pool import TierEntry


class TierUse:
    """One expert of a tier, which keeps it until `close`. For one thread at a time.

    entry: the expert if it is in the tier; None: the first `step` opens it.
    """

    def __init__(
        self, contents: TierContents, layer: int, expert: int, entry: TierEntry | None
    ) -> None:
        self._contents = contents
        self._key = layer, expert
        self._entry = entry
        if entry:
            entry.users.add(self)
        self.done = 0
        """Bytes that this use has read from the file."""

    @property
    def has_bytes(self) -> bool:
        """True if the expert is read, so that `blob` is valid."""
        return self._entry is not None and self._entry.blob is not None

    @property
    def is_pinned(self) -> bool:
        """True if `blob` is page-locked: the GPU copies from it without the CPU's help."""
        return self._entry is not None and self._contents.is_pinned(self._entry)

    @property
    def blob(self) -> Tensor:
        """The expert's bytes, uint8 [n_bytes]; nobody writes to them."""
        if self._entry is None or self._entry.blob is None:
            raise RuntimeError(f"layer {self._key[0]} expert {self._key[1]} is not read yet")
        return self._entry.blob

    def step(self, at_most: int | None = None) -> int:
        """Read up to `at_most` bytes (None: all), and return how many were read.

        Raises the errors of `formats.reading.reader.Load`.
        """
        if self._entry is None:
            self._entry = self._contents.open(*self._key, self)
        read = self._contents.step(self._entry, at_most)
        self.done += read
        return read

    def close(self, copy: Event | None = None) -> None:
        """End the use: now, or when the event `copy` is reached."""
        if self._entry is not None:
            entry, self._entry = self._entry, None
            self._contents.end(self, entry, copy)

    def __enter__(self) -> "TierUse":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()
