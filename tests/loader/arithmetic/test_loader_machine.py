import os

import pytest

from formats.errors import MoeConvertError
from formats.reading.direct_file import DirectFile
from loader.arithmetic import machine


def test_the_memory_has_a_speed():
    assert machine.memory_bytes_per_s(seconds=0.01) > 0


def test_each_block_of_all_files_is_read_at_most_once(tmp_path, monkeypatch):
    files = [tmp_path / name for name in "ab"]
    for file in files:
        file.write_bytes(bytes(5 * 4096 + 1))
    read = []
    real = DirectFile.read

    def noted(self, offset, *place):
        read.append((self.path, offset))
        return real(self, offset, *place)

    monkeypatch.setattr(DirectFile, "read", noted)
    # Blocks of whole pages: two in each file.
    assert machine.disk_bytes_per_s(files, 5000, seconds=60) > 0
    assert sorted(read) == [(file, begin) for file in files for begin in (0, 8192)]


def test_a_block_is_read_without_direct_reads_too(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    (tmp_path / "a").write_bytes(bytes(4096) + b"x" * 4096)
    view = memoryview(bytearray(4096))
    assert DirectFile(tmp_path / "a").read(4096, view, 0, 4096) == 4096
    assert bytes(view) == b"x" * 4096


def test_without_a_block_to_read_the_option_is_named(tmp_path):
    (tmp_path / "a").write_bytes(bytes(100))
    with pytest.raises(MoeConvertError, match="4096 bytes") as found:
        machine.disk_bytes_per_s([tmp_path / "a"], 4096)
    assert "--disk" in found.value.hint
