"""Finds tool calls in an answer's text, in the two notations of chat models."""

import json
import re
import secrets
from dataclasses import dataclass
from typing import Any

MARKERS = ("[TOOL_CALLS]", "<tool_call>", "</tool_call>")
"""Marks of tool calls. Mistral: the first, then a JSON list. Qwen and Hermes: the second, a JSON
object, the third.
"""


@dataclass(frozen=True)
class ToolCall:
    """One call. arguments: JSON text, as in OpenAI's API."""

    name: str
    arguments: str

    def as_dict(self, index: int | None = None) -> dict[str, Any]:
        """Return the call as in OpenAI's API. index: its number in a stream's chunk."""
        call: dict[str, Any] = {"id": f"call_{secrets.token_hex(12)}", "type": "function"}
        call["function"] = {"name": self.name, "arguments": self.arguments}
        return call if index is None else {"index": index, **call}


class ToolCallText:
    """Splits an answer into text and tool calls: returns text before the first mark, collects the
    rest.
    """

    def __init__(self) -> None:
        self._held = ""
        self._is_call = False

    def push(self, text: str) -> str:
        """Add `text`. Return the text that cannot belong to a call."""
        self._held += text
        if self._is_call:
            return ""
        places = [place for mark in MARKERS[:2] if (place := self._held.find(mark)) >= 0]
        if places:
            self._is_call = True
            return self._give(min(places))
        held = next(
            (
                n
                for n in range(12, 0, -1)
                if any(m.startswith(self._held[-n:]) for m in MARKERS[:2])
            ),
            0,
        )
        return self._give(len(self._held) - min(held, len(self._held)))

    def end(self, allowed: frozenset[str]) -> tuple[str, list[ToolCall]]:
        """Return the remaining text and the calls. An incomplete call, or one of a tool outside
        `allowed`, stays text.
        """
        calls = _calls(self._held) if self._is_call else None
        if calls and all(call.name in allowed for call in calls):
            return "", calls
        return self._give(len(self._held)), []

    def _give(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text


def _calls(text: str) -> list[ToolCall] | None:
    """Return the calls in `text`; None if it holds anything else."""
    if text.startswith(MARKERS[0]):
        return _parsed([text.removeprefix(MARKERS[0])])
    parts = re.findall(r"<tool_call>(.*?)</tool_call>", text, re.S)
    rest = re.sub(r"<tool_call>.*?</tool_call>", "", text, flags=re.S)
    return _parsed(parts) if parts and not rest.strip() else None


def _parsed(texts: list[str]) -> list[ToolCall] | None:
    calls = []
    for text in texts:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        for call in value if isinstance(value, list) else [value]:
            if not isinstance(call, dict) or not isinstance(call.get("name"), str):
                return None
            arguments = call.get("arguments", call.get("parameters", {}))
            if not isinstance(arguments, dict):
                return None
            calls.append(ToolCall(call["name"], json.dumps(arguments, ensure_ascii=False)))
    return calls
