"""The readers of experts, by name."""

from formats.reading.direct_reader import DirectReader
from formats.reading.mmap_reader import MmapReader
from formats.reading.reader import ExpertReader

READERS: dict[str, type[ExpertReader]] = {"mmap": MmapReader, "direct": DirectReader}
