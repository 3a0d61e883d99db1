"""The ways to read experts, by name."""

from formats.direct_reader import DirectReader
from formats.mmap_reader import MmapReader
from formats.reader import ExpertReader

READERS: dict[str, type[ExpertReader]] = {"mmap": MmapReader, "direct": DirectReader}
