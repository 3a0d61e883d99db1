"""The metadata of a model card: the YAML block at its beginning.

The source's card is a stranger's text. Only fields that describe the weights are carried over, and
only values that have the form that the Hub documents.
"""

import re
from collections.abc import Callable
from typing import Any

import yaml

from formats.labels import has_controls

Metadata = dict[str, Any]
"""Field of a card -> value, in the order of the card."""

_BLOCK = re.compile(r"\s*---[ \t]*\r?\n(.*?)(?:\r?\n)?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_ID = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_LANGUAGE = re.compile(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*")
_TAG = re.compile(r"[A-Za-z0-9][\w.+ -]{0,63}")
_LINK = re.compile(r"https?://[^\s<>\"'`()\[\]]{1,500}|[A-Za-z0-9][\w.-]{0,100}")
_MAX_LIST = 100
_NOT_OF_CONVERTED = frozenset(
    ("awq", "exl2", "gguf", "gptq", "mlx", "pytorch", "safetensors", "transformers", "vllm")
)
"""Tags by which the Hub offers programs that cannot load a converted folder."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads YAML without aliases: merged again and again, they would fill the memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node. Raises YAMLError for an alias."""
        if self.check_event(yaml.events.AliasEvent):  # type: ignore[no-untyped-call]
            raise yaml.YAMLError("aliases are not allowed")
        return super().compose_node(parent, index)  # type: ignore[no-untyped-call]


def split_card(text: str) -> tuple[str | None, str]:
    """Return (metadata as YAML, None without a block; the rest of the card)."""
    match = _BLOCK.match(text)
    return (match[1], text[match.end() :]) if match else (None, text)


def parse_metadata(block: str | None) -> Metadata:
    """Parse a card's YAML block; {} for None or an empty block. Raises ValueError."""
    try:
        value = yaml.load(block or "", _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as e:
        raise ValueError(f"its metadata is no plain YAML: {' '.join(str(e).split())}") from None
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ValueError("its metadata is no list of fields")
    return value


def dump_metadata(metadata: Metadata) -> str:
    """Return the block with its two lines of dashes."""
    text = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=10**6)
    return f"---\n{text}---\n"


def carried_over(metadata: Metadata) -> Metadata:
    """Return the fields that also hold for the converted model, where their values are valid.

    They are the licence, languages, task and tags.
    """
    checks: dict[str, Callable[[Any], Any]] = {
        "license": _one_or_more(_ID),
        "license_name": _label,
        "license_link": _one(_LINK),
        "language": _one_or_more(_LANGUAGE),
        "pipeline_tag": _one(_ID),
        "tags": _tags,
    }
    carried = {name: check(metadata.get(name)) for name, check in checks.items()}
    if not carried["license"]:
        carried |= {"license_name": None, "license_link": None}
    return {name: value for name, value in carried.items() if value}


def _one(pattern: re.Pattern[str]) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        return value if isinstance(value, str) and pattern.fullmatch(value) else None

    return check


def _one_or_more(pattern: re.Pattern[str]) -> Callable[[Any], str | list[str] | None]:
    one = _one(pattern)

    def check(value: Any) -> str | list[str] | None:
        if isinstance(value, list):
            return [item for item in value if one(item)][:_MAX_LIST]
        return one(value)

    return check


def _tags(value: Any) -> list[str]:
    if not isinstance(value, list):
        return []
    tags = [tag for tag in value if isinstance(tag, str) and _TAG.fullmatch(tag)]
    return [tag for tag in tags if tag.lower() not in _NOT_OF_CONVERTED][:_MAX_LIST]


def _label(value: Any) -> str | None:
    is_label = isinstance(value, str) and len(value) <= 200 and not has_controls(value)
    return value if is_label else None
