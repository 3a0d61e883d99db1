"""Rejects JSON schemas that a grammar cannot enforce completely.

xgrammar ignores keywords that it does not know, and many combinations of known ones. A request with
such a schema is refused instead.
"""

import re
from typing import Any

from loader.serving.answers.request import RefusedError

_ANNOTATIONS = frozenset(
    {
        "title",
        "description",
        "default",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
        "$schema",
        "$id",
        "$comment",
    }
)
_DEFINITIONS = ("$defs", "definitions")
_TYPE_KEYWORDS = {
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties"},
    "boolean": set(),
    "null": set(),
}
_FORMATS = {
    "date",
    "time",
    "date-time",
    "duration",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "uuid",
    "uri",
}
_UNENFORCED_PATTERN = re.compile(r"\(\?[^:]|\\[bBkK1-9]")
_PYTHON_TYPES = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "array": list,
    "object": dict,
    "boolean": bool,
    "null": type(None),
}
_MAX_DEPTH = 50


def check_schema(schema: Any, where: str, depth: int = 0) -> None:
    """Raise RefusedError, naming the place, if a grammar cannot enforce `schema`.

    where: the schema's place in the request.
    """
    if schema is True or (schema is False and depth):
        return
    if not isinstance(schema, dict):
        raise _refused(where, "a schema is an object")
    if depth > _MAX_DEPTH:
        raise _refused(where, f"more than {_MAX_DEPTH} levels")
    for name in _DEFINITIONS:
        for key, part in _object(schema.get(name, {}), f"{where}.{name}").items():
            check_schema(part, f"{where}.{name}.{key}", depth + 1)
    keywords = schema.keys() - _ANNOTATIONS - set(_DEFINITIONS)
    for check in (_check_single, _check_values, _check_typed):
        if check(schema, keywords, where, depth):
            return


def _check_single(schema: Any, keywords: set[str], where: str, depth: int) -> bool:
    """Check $ref, anyOf and allOf, which must stand alone. True if `schema` has one of them."""
    for name in ("$ref", "anyOf", "allOf"):
        if name not in keywords:
            continue
        if others := sorted(keywords - {name}):
            raise _refused(f"{where}.{others[0]}", f"not supported beside {name}")
        if name == "$ref":
            return True
        parts = schema[name]
        if not isinstance(parts, list) or not parts or (name == "allOf" and len(parts) > 1):
            raise _refused(
                f"{where}.{name}",
                "a list of one schema" if name == "allOf" else "a list of schemas",
            )
        for number, part in enumerate(parts):
            check_schema(part, f"{where}.{name}[{number}]", depth + 1)
        return True
    return False


def _check_values(schema: Any, keywords: set[str], where: str, depth: int) -> bool:
    """Check enum and const; only a type may stand beside them. True if `schema` has one."""
    name = next((name for name in ("enum", "const") if name in keywords), None)
    if name is None:
        return False
    if others := sorted(keywords - {name, "type"}):
        raise _refused(f"{where}.{others[0]}", f"not supported beside {name}")
    values = schema[name] if name == "enum" else [schema[name]]
    if not isinstance(values, list) or not values:
        raise _refused(f"{where}.{name}", "a list of values")
    if "type" in schema:
        for value in values:
            if not any(_has_type(value, kind) for kind in _types(schema, where)):
                raise _refused(
                    f"{where}.{name}", f"{value!r} is not of the type {schema['type']!r}"
                )
    return True


def _check_typed(schema: Any, keywords: set[str], where: str, depth: int) -> bool:
    """Check a type and its keywords."""
    types = _types(schema, where) if "type" in schema else []
    known = set[str]().union({"type"}, *(_TYPE_KEYWORDS[kind] for kind in types))
    if others := sorted(keywords - known):
        raise _refused(
            f"{where}.{others[0]}", "not supported" if types else "not supported without a type"
        )
    if ("pattern" in schema) + ("format" in schema) + bool(
        {"minLength", "maxLength"} & keywords
    ) > 1:
        raise _refused(where, "only one of pattern, format and lengths is supported")
    if "pattern" in schema and _UNENFORCED_PATTERN.search(str(schema["pattern"])):
        raise _refused(
            f"{where}.pattern", "look-around, word boundaries and references are not supported"
        )
    if schema.get("format", "date") not in _FORMATS:
        raise _refused(
            f"{where}.format", f"{schema['format']!r} is none of {', '.join(sorted(_FORMATS))}"
        )
    properties = _object(schema.get("properties", {}), f"{where}.properties")
    for name, part in properties.items():
        check_schema(part, f"{where}.properties.{name}", depth + 1)
    required = schema.get("required", [])
    if not isinstance(required, list) or any(name not in properties for name in required):
        raise _refused(f"{where}.required", "names of properties")
    for name in ("items", "additionalProperties"):
        if name in schema:
            check_schema(schema[name], f"{where}.{name}", depth + 1)
    for number, part in enumerate(schema.get("prefixItems", [])):
        check_schema(part, f"{where}.prefixItems[{number}]", depth + 1)
    return True


def _types(schema: Any, where: str) -> list[str]:
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not types or any(not isinstance(kind, str) or kind not in _TYPE_KEYWORDS for kind in types):
        raise _refused(
            f"{where}.type", f"{schema['type']!r} is none of {', '.join(_TYPE_KEYWORDS)}"
        )
    return types


def _has_type(value: Any, kind: str) -> bool:
    if isinstance(value, bool) and kind != "boolean":
        return False
    return isinstance(value, _PYTHON_TYPES[kind])  # type: ignore[arg-type]


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _refused(where, "an object was expected")
    return value


def _refused(where: str, what: str) -> RefusedError:
    return RefusedError(f"{where}: {what}", "response_format")
