import json

import msgspec
import numpy as np
import pytest
import zstandard
from made_traces import random_experts, trace_of

from formats.errors import DamageError, FormatError, MoeConvertError, VersionError
from loader.traces.trace import Trace, read_trace, write_trace

ARRAYS = ("experts", "weights", "guesses", "guesses_next_norm")


@pytest.fixture
def trace():
    return trace_of(random_experts(0, 20, layers=3), prompts=[(12, 4), (8, 0)])


@pytest.fixture
def written(trace, tmp_path):
    path = tmp_path / "trace.zst"
    write_trace(path, trace)
    return path


def rewrite(path, change=lambda header: None, body=lambda data: data):
    """Changes the header (as a dict) and the arrays' bytes of the trace at `path`."""
    line, _, data = zstandard.ZstdDecompressor().decompress(path.read_bytes()).partition(b"\n")
    header = json.loads(line)
    change(header)
    path.write_bytes(
        zstandard.ZstdCompressor().compress(json.dumps(header).encode() + b"\n" + body(data))
    )


@pytest.mark.parametrize("layers", [1, 3])
def test_a_trace_is_read_as_it_was_written(tmp_path, layers):
    trace = trace_of(random_experts(1, 30, layers=layers), prompts=[(10, 10), (20, 3)])
    write_trace(tmp_path / "t.zst", trace)
    found = read_trace(tmp_path / "t.zst")
    assert found.header == trace.header
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(found, name), getattr(trace, name))


def test_the_file_is_a_header_line_and_arrays_as_the_page_says(written, trace):
    data = zstandard.ZstdDecompressor().decompress(written.read_bytes())
    line, _, body = data.partition(b"\n")
    header = json.loads(line)
    assert header["format"] == "moe-convert trace"
    assert header["sequences"][0] == {"text": 0, "tokens": 12, "prompt_tokens": 4}
    # 20 tokens, 3 layers, 2 experts: u1 and f2; then twice 2 layers with 4 guesses.
    assert len(body) == 20 * 3 * 2 * 3 + 2 * 20 * 2 * 4
    assert list(body[:6]) == trace.experts[0].ravel().tolist()


def test_the_same_trace_gives_the_same_bytes(trace, written, tmp_path):
    write_trace(tmp_path / "again", trace)
    assert (tmp_path / "again").read_bytes() == written.read_bytes()


def test_uses_counts_the_tokens_of_each_expert():
    trace = trace_of([[[0, 1], [2, 3]], [[0, 2], [3, 1]]], count=4)
    assert trace.uses().tolist() == [[2, 1, 1, 0], [0, 1, 1, 2]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.pop("model"), "model"),
        (lambda h: h.update(extra=1), "extra"),
        (lambda h: h.update(format="other"), "format is not"),
        (lambda h: h["architecture"].update(num_local_experts=300), "up to 256"),
        (lambda h: h.update(expert_bytes=[1]), "expert_bytes has 1"),
        (lambda h: h.update(guesses=9), "9 guesses of 8"),
        (lambda h: h["sequences"][1].update(text=1), "is of text 1, but the trace has 1 texts"),
        (lambda h: h["sequences"][0].update(prompt_tokens=13), "13 prompt tokens, but only 12"),
        (lambda h: h["sequences"][0].update(tokens=-1), "tokens"),
        (lambda h: h["sequences"].clear(), "no sequences"),
        (lambda h: h["sequences"][0].update(tokens=2**31), "take more than"),
        (lambda h: h["sequences"][0].update(tokens=13), "the header announces"),
        (lambda h: h["texts"][0].update(sha256="xyz"), "sha256"),
    ],
)
def test_a_wrong_header_is_refused_by_name(written, change, message):
    rewrite(written, change)
    with pytest.raises(FormatError, match=message):
        read_trace(written)


def test_another_version_is_refused(written):
    rewrite(written, lambda h: h.update(format_version=3))
    with pytest.raises(VersionError, match="format_version is 3"):
        read_trace(written)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda data: data[:-1], "the header announces"),
        (lambda data: data + b"\0", "the header announces"),
        (lambda data: b"\x08" + data[1:], "experts has expert 8 of 8"),
        (lambda data: data[1:2] + data[1:], "token 0, layer 0 has an expert twice"),
        (lambda data: data[:120] + b"\xff\xff" + data[122:], "weights are not all finite"),
        (lambda data: data[:-1] + b"\xff", "guesses_next_norm has expert 255 of 8"),
    ],
)
def test_wrong_arrays_are_refused(written, body, message):
    rewrite(written, body=body)
    with pytest.raises(FormatError, match=message):
        read_trace(written)


def test_a_cut_or_changed_or_longer_file_is_refused(written):
    data = written.read_bytes()
    for bad in (
        data[:-5],
        data[: len(data) // 2],
        data[:-1] + bytes([data[-1] ^ 1]),
        data + b"more",
        data + data,
    ):
        written.write_bytes(bad)
        with pytest.raises(FormatError):
            read_trace(written)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x"
    for data in (
        b"",
        b"\x80\x04.",
        b"{}\n",
        zstandard.compress(b"no line"),
        zstandard.compress(b"[]\n"),
    ):
        path.write_bytes(data)
        with pytest.raises(FormatError):
            read_trace(path)
    with pytest.raises(MoeConvertError, match="cannot be read"):
        read_trace(tmp_path / "none")


def test_a_frame_of_unknown_size_is_refused(written):
    data = zstandard.ZstdDecompressor().decompress(written.read_bytes())
    written.write_bytes(zstandard.ZstdCompressor(write_content_size=False).compress(data))
    with pytest.raises(DamageError, match="unpacked"):
        read_trace(written)


def test_what_the_reader_would_refuse_is_not_written(trace, tmp_path):
    wrong = Trace(trace.header, trace.experts[:-1], *(getattr(trace, name) for name in ARRAYS[1:]))
    with pytest.raises(FormatError, match="experts is uint8"):
        write_trace(tmp_path / "t.zst", wrong)
    header = msgspec.structs.replace(trace.header, sequences=[])
    with pytest.raises(FormatError, match="no sequences"):
        write_trace(tmp_path / "t.zst", Trace(header, *(getattr(trace, name) for name in ARRAYS)))
    assert not list(tmp_path.iterdir())
