"""JSON from strangers: strict parsing, then typing by msgspec."""

import json
import math
import re
from typing import Any, NoReturn, TypeVar

import msgspec

from formats.errors import FormatError
from formats.labels import LABEL_PATTERN

MAX_DEPTH = 32
"""Deeper nesting is refused before parsing, which would otherwise exhaust the stack."""

_STRING_OR_BRACKET = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{\]}]', re.DOTALL)

T = TypeVar("T")


def parse(
    data: bytes,
    where: str,
    *,
    max_bytes: int = 16 << 20,
    max_depth: int = MAX_DEPTH,
    error: type[FormatError] | type[Exception] = FormatError,
) -> Any:
    """Parse UTF-8 JSON.

    Raises `error`, with `where` in its message, for more than `max_bytes`, a byte order mark,
    invalid UTF-8, nesting over `max_depth`, duplicate keys, NaN and infinities (also as 1e999),
    lone surrogates, and text after the value.
    """

    def refuse(problem: str) -> NoReturn:
        raise error(f"{where}: {problem[:300]}")

    if len(data) > max_bytes:
        refuse(f"{len(data)} bytes, the limit is {max_bytes}")
    if data.startswith(b"\xef\xbb\xbf"):
        refuse("starts with a byte order mark; UTF-8 without one is required")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        refuse(f"not UTF-8: byte {data[e.start]:#04x} at offset {e.start}")
    if _deeper(text, max_depth):
        refuse(f"nested more than {max_depth} deep")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                refuse(f"key {key!r} stands twice in one object")
            result[key] = value
        return result

    def finite(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):
            refuse(f"number {number} is not finite")
        return value

    try:
        value = json.loads(
            text,
            object_pairs_hook=unique,
            parse_float=finite,
            parse_constant=lambda name: refuse(f"{name} is not JSON"),
        )
        # A lone surrogate has no UTF-8 form and would fail later, at the first use of the text.
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as e:
        refuse(f"not Unicode: a string holds the lone surrogate {e.object[e.start]!r}")
    except ValueError as e:
        refuse(f"not JSON: {e}")
    return value


def typed(
    value: Any,
    kind: type[T],
    where: str,
    *,
    error: type[FormatError] | type[Exception] = FormatError,
) -> T:
    """Convert `value` to the msgspec type `kind`, without coercion.

    Raises `error` with `where` and the field.
    """
    try:
        return msgspec.convert(value, kind, strict=True)
    except (msgspec.ValidationError, OverflowError) as e:
        # The pattern of labels is long; say what it means.
        message = str(e).replace(f"matching regex {LABEL_PATTERN!r}", "without control characters")
        raise error(f"{where}: {message}{_value_at(value, str(e))}") from None


def dump(value: Any) -> bytes:
    """Write `value` as indented UTF-8 JSON with a final newline. Equal values give equal bytes."""
    return msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"


def _value_at(value: Any, message: str) -> str:
    """Format the value at the path that ends msgspec's message, such as `$.layers[0].file`."""
    try:
        for name, number in re.findall(r"\.(\w+)|\[(\d+)\]", message.rpartition("`$")[2]):
            value = value[name] if name else value[int(number)]
    except (KeyError, IndexError, TypeError):
        # msgspec does not name the keys of a map.
        return ""
    return "" if isinstance(value, (dict, list)) else f", found {repr(value)[:100]}"


def _deeper(text: str, max_depth: int) -> bool:
    """True if brackets outside of strings nest more than `max_depth` deep."""
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        first = text[match.start()]
        if first in "[{":
            depth += 1
            if depth > max_depth:
                return True
        elif first in "]}":
            depth -= 1
    return False
