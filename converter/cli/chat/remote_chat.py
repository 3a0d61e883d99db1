"""Connects a chat to a running server."""

from dataclasses import dataclass
from typing import Any

import click

from converter.cli.chat.chat_server import ChatServer
from converter.cli.chat.remote_session import RemoteSession
from formats.errors import MoeConvertError
from loader.serving.answers.settings import GenerationSettings


@dataclass(frozen=True)
class RemoteChat:
    """A server, and the model that the chat uses there."""

    server: ChatServer
    model: str
    context_tokens: int | None

    @classmethod
    def connect(cls, url: str, key: str | None, model: str | None) -> "RemoteChat":
        """Ask the server at `url` for its models. model: None is the only one, or an error."""
        server = ChatServer(url, key)
        entries = {str(entry["id"]): entry for entry in server.models()}
        names = ", ".join(entries)
        if model is None and len(entries) != 1:
            raise click.UsageError(f"{server.url} serves {names or 'no model'}: give --model NAME")
        name = model or names
        if name not in entries:
            raise MoeConvertError(f"{server.url} does not serve {name}", f"it serves {names}")
        return cls(server, name, _context_of(entries[name]))

    def session(
        self, settings: GenerationSettings, max_new_tokens: int | None, system: str
    ) -> RemoteSession:
        """Return a new conversation."""
        return RemoteSession(
            self.server,
            self.model,
            settings,
            max_new_tokens=max_new_tokens,
            system=system,
            context_tokens=self.context_tokens,
        )


def _context_of(entry: dict[str, Any]) -> int | None:
    # vLLM and moe-convert say it; OpenAI's API has no such field.
    length = entry.get("max_model_len")
    return length if isinstance(length, int) and length > 0 else None
