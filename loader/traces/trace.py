"""The file format of routing traces (docs/traces.md): reading, writing and checks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import zstandard
from msgspec import Meta, Struct
from numpy.typing import NDArray

from formats.config.strict_json import parse, typed
from formats.errors import DamageError, FormatError, MoeConvertError, VersionError
from formats.files.io_errors import translated
from formats.files.partial_file import write_file
from formats.index import Architecture, Label, Natural, Positive, Sha256

TRACE_FORMAT = "moe-convert trace"
TRACE_VERSION = 2
MAX_HEADER_BYTES = 16 << 20
MAX_BYTES = 4 << 30
"""Largest unpacked trace: 5 million tokens of a model with 56 layers."""
_FRAME = b"\x28\xb5\x2f\xfd"
_HINT = "moe-convert trace MODEL --text FILE -o TRACE  # record the trace again"


class _Part(Struct, frozen=True, forbid_unknown_fields=True):
    pass


class TracedText(_Part, frozen=True):
    """A file of text or prompts, and the sha256 of its bytes."""

    name: Label
    sha256: Sha256


class TracedSequence(_Part, frozen=True):
    """Consecutive tokens of one context: a window, or a prompt with its continuation.

    text: number of its text. tokens: all tokens, of which the first `prompt_tokens` ran through the
    model together.
    """

    text: Natural
    tokens: Positive
    prompt_tokens: Natural


class TraceHeader(_Part, frozen=True):
    """The first line of a trace.

    expert_bytes: stored bytes of each layer's largest expert. guesses: guesses of each token and
    layer.
    """

    format: Label
    format_version: Natural
    producer: Label
    model: Label
    architecture: Architecture
    expert_bytes: list[Positive]
    guesses: Annotated[int, Meta(ge=1, le=256)]
    texts: list[TracedText]
    sequences: list[TracedSequence]

    @property
    def tokens(self) -> int:
        """Number of tokens in all sequences."""
        return sum(sequence.tokens for sequence in self.sequences)

    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return name -> (little-endian dtype, shape) of the arrays, in the order of the file."""
        layers, chosen = self.architecture.expert_layers, self.architecture.num_experts_per_tok
        guessed = "u1", (self.tokens, layers - 1, self.guesses)
        return {
            "experts": ("u1", (self.tokens, layers, chosen)),
            "weights": ("<f2", (self.tokens, layers, chosen)),
            "guesses": guessed,
            "guesses_next_norm": guessed,
        }


@dataclass(frozen=True)
class Trace:
    """A routing trace, checked.

    experts: uint8 [tokens, layers, chosen], by rank, the first choice first.
    weights: the router's weights of these experts, float16 [tokens, layers, chosen].
    guesses: guesses at layer l for layer l + 1, best first, uint8 [tokens, layers - 1, guesses].
    guesses_next_norm: the same, computed with the norm weight of layer l + 1.
    """

    header: TraceHeader
    experts: NDArray[np.uint8]
    weights: NDArray[np.float16]
    guesses: NDArray[np.uint8]
    guesses_next_norm: NDArray[np.uint8]

    def uses(self) -> NDArray[np.int64]:
        """Return how many tokens used each expert, int64 [layers, experts]."""
        count = self.header.architecture.num_local_experts
        layers = range(self.experts.shape[1])
        return np.stack(
            [np.bincount(self.experts[:, layer].ravel(), minlength=count) for layer in layers]
        )


def write_trace(path: Path, trace: Trace) -> None:
    """Write `trace` to `path` atomically.

    Raises FormatError if the reader would reject it, MoeConvertError if the file cannot be written.
    """
    _check(trace, str(path))
    parts = [msgspec.json.encode(trace.header), b"\n"]
    for name, (dtype, _) in trace.header.arrays().items():
        parts.append(np.ascontiguousarray(getattr(trace, name), dtype=dtype).tobytes())
    data = zstandard.ZstdCompressor(level=12, write_checksum=True).compress(b"".join(parts))
    write_file(path, data)


def is_trace(path: Path) -> bool:
    """True if the file begins with the zstd magic number of traces."""
    try:
        with open(path, "rb") as f:
            return f.read(len(_FRAME)) == _FRAME
    except OSError:
        return False


def read_trace(path: Path) -> Trace:
    """Return the trace in `path`, checked.

    Raises MoeConvertError if the file cannot be read; FormatError, DamageError or VersionError if
    its content is wrong.
    """
    where = str(path)
    with translated(path, "read", MoeConvertError):
        data = path.read_bytes()
    if not data.startswith(_FRAME):
        raise FormatError(
            f"{where}: not a trace: no zstd frame", "name a file that moe-convert trace wrote"
        )
    decompressor = zstandard.ZstdDecompressor(max_window_size=128 << 20)
    try:
        declared = zstandard.frame_content_size(data)
        with decompressor.stream_reader(data) as reader:
            line, newline, _ = reader.read(MAX_HEADER_BYTES).partition(b"\n")
        if not newline:
            raise FormatError(
                f"{where}: no header line in the first {MAX_HEADER_BYTES} bytes", _HINT
            )
        header = _parse_header(line, where)
        needed = _array_bytes(header)
        if declared != len(line) + 1 + needed:
            raise DamageError(
                f"{where}: {declared} bytes unpacked;"
                f" the header announces {len(line)} + 1 + {needed}",
                _HINT,
            )
        body = decompressor.decompress(data, max_output_size=declared, allow_extra_data=False)
    except zstandard.ZstdError as e:
        raise DamageError(f"{where}: broken zstd frame: {e}", _HINT) from None
    arrays: dict[str, Any] = {}
    offset = len(line) + 1
    for name, (dtype, shape) in header.arrays().items():
        arrays[name] = np.frombuffer(body, dtype, int(np.prod(shape)), offset).reshape(shape)
        offset += arrays[name].nbytes
    trace = Trace(header, **arrays)
    _check(trace, where)
    return trace


def _parse_header(line: bytes, where: str) -> TraceHeader:
    value = parse(line, where, max_bytes=MAX_HEADER_BYTES)
    if not isinstance(value, dict) or value.get("format") != TRACE_FORMAT:
        raise FormatError(
            f"{where}: field format is not {TRACE_FORMAT!r}",
            "name a file that moe-convert trace wrote",
        )
    version = value.get("format_version")
    if type(version) is int and version != TRACE_VERSION:
        raise VersionError(
            f"{where}: format_version is {version}; this release reads {TRACE_VERSION}", _HINT
        )
    header = typed(value, TraceHeader, where)
    _check_header(header, where)
    return header


def _array_bytes(header: TraceHeader) -> int:
    return sum(
        int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
        for dtype, shape in header.arrays().values()
    )


def _check_header(header: TraceHeader, where: str) -> None:
    architecture = header.architecture
    if not header.sequences:
        raise FormatError(f"{where}: no sequences", _HINT)
    if architecture.num_local_experts > 256:
        raise FormatError(
            f"{where}: {architecture.num_local_experts} experts per layer, expected up to 256",
            _HINT,
        )
    if len(header.expert_bytes) != architecture.expert_layers:
        raise FormatError(
            f"{where}: expert_bytes has {len(header.expert_bytes)} numbers"
            f" for {architecture.expert_layers} layers",
            _HINT,
        )
    if header.guesses > architecture.num_local_experts:
        raise FormatError(
            f"{where}: {header.guesses} guesses of {architecture.num_local_experts} experts", _HINT
        )
    for number, sequence in enumerate(header.sequences):
        if sequence.text >= len(header.texts):
            raise FormatError(
                f"{where}: sequence {number} is of text {sequence.text},"
                f" but the trace has {len(header.texts)} texts, counted from 0",
                _HINT,
            )
        if sequence.prompt_tokens > sequence.tokens:
            raise FormatError(
                f"{where}: sequence {number} has {sequence.prompt_tokens} prompt tokens,"
                f" but only {sequence.tokens} tokens",
                _HINT,
            )
    if _array_bytes(header) > MAX_BYTES:
        raise FormatError(
            f"{where}: {header.tokens} tokens take more than {MAX_BYTES} bytes",
            "record a shorter trace: moe-convert trace --max-tokens",
        )


def _check(trace: Trace, where: str) -> None:
    _check_header(trace.header, where)
    for name, (dtype, shape) in trace.header.arrays().items():
        array = getattr(trace, name)
        if array.shape != shape or array.dtype != np.dtype(dtype):
            raise FormatError(
                f"{where}: {name} is {array.dtype} {array.shape}, expected {dtype} {shape}", _HINT
            )
    count = trace.header.architecture.num_local_experts
    for name in ("experts", "guesses", "guesses_next_norm"):
        array = getattr(trace, name)
        if not array.size:
            continue
        if (largest := int(array.max())) >= count:
            raise FormatError(f"{where}: {name} has expert {largest} of {count}", _HINT)
        in_order = np.sort(array, axis=2)
        if twice := np.argwhere(in_order[:, :, 1:] == in_order[:, :, :-1]).tolist():
            raise FormatError(
                f"{where}: {name}: token {twice[0][0]}, layer {twice[0][1]} has an expert twice",
                _HINT,
            )
    if not np.isfinite(trace.weights).all():
        raise FormatError(f"{where}: weights are not all finite", _HINT)
