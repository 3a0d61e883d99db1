"""Calls of tools in an answer's text, in the two ways that chat models write them."""

import json
import re
import secrets
from dataclasses import dataclass
from typing import Any

MARKERS = ("[TOOL_CALLS]", "<tool_call>", "</tool_call>")
"""What begins calls: Mistral's, then a JSON list; Qwen's and Hermes', then a JSON object and the
end mark.
"""


@dataclass(frozen=True)
class ToolCall:
    """One call; `arguments` is JSON, as the interface has it."""

    name: str
    arguments: str

    def as_dict(self, index: int | None = None) -> dict[str, Any]:
        """Return it as the interface writes it; with an index as in a stream's chunk."""
        call: dict[str, Any] = {"id": f"call_{secrets.token_hex(12)}", "type": "function"}
        call["function"] = {"name": self.name, "arguments": self.arguments}
        return call if index is None else {"index": index, **call}


class ToolCallText:
    """The text of an answer that may call tools: text before the first mark is given out, the rest
    is collected.
    """

    def __init__(self) -> None:
        self._held = ""
        self._is_call = False

    def push(self, text: str) -> str:
        """Return what of the text so far is sure to be no call."""
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
        """Return the text that is left and the calls of tools named in `allowed`; text that is no
        whole call stays text.
        """
        calls = _calls(self._held) if self._is_call else None
        if calls and all(call.name in allowed for call in calls):
            return "", calls
        return self._give(len(self._held)), []

    def _give(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text


def _calls(text: str) -> list[ToolCall] | None:
    """The calls that a text is made of; None if it is anything else."""
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
