"""The slash commands of a chat."""

import dataclasses
import difflib
import json
import time
from pathlib import Path
from typing import Any

import click

from converter.cli.show.tables import table
from converter.cli.show.terminal import printable
from formats.errors import MoeConvertError, OutputError
from formats.sizes import format_size
from loader.serving.conversation import Conversation

HELP = {
    "/reset": "forget the conversation but keep the system message",
    "/save": "[FILE]  save the conversation as JSON",
    "/system": "[TEXT]  show or set the system message; - removes it",
    "/stats": "show tokens, speed and expert cache so far",
    "/help": "show this list",
    "/exit": "leave, like Ctrl-D",
}
"""Command → help text."""

MORE_HELP = """\
Ctrl-C stops the answer. A line that ends with \\ continues on the next line.
\"\"\" begins and ends a message of several lines. Pasted lines are one message.
A message that begins with // is sent with a single slash."""


class ChatCommands:
    """Runs slash commands on `session` and prints to stderr.

    model_name: recorded by /save. model: the loaded model, None if a server has it.
    """

    def __init__(self, session: Conversation, model: Any | None, model_name: str) -> None:
        self._session = session
        self._model = model
        self._model_name = model_name
        self.is_over = False
        """True after /exit."""

    def run(self, line: str) -> None:
        """Run the command in `line`. MoeConvertError if it is unknown or fails."""
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        match name:
            case "/reset":
                self._session.reset()
                _say("The conversation was reset.")
            case "/save":
                self._save(rest)
            case "/system":
                self._system(rest)
            case "/stats":
                _say(self._stats())
            case "/help":
                _say(table(list(HELP.items()), left=2) + "\n" + MORE_HELP)
            case "/exit" | "/quit":
                self.is_over = True
            case _:
                near = difflib.get_close_matches(name, HELP, 1)
                raise MoeConvertError(
                    f"unknown command {name}",
                    f"did you mean {near[0]}?" if near else "/help lists the commands",
                )

    def _system(self, text: str) -> None:
        if text:
            self._session.set_system("" if text == "-" else text)
        _say(f"System message: {self._session.system or 'none'}")

    def _save(self, name: str) -> None:
        path = Path(name or time.strftime("chat-%Y%m%d-%H%M%S.json")).expanduser()
        settings = {
            key: value for key, value in dataclasses.asdict(self._session.settings).items() if value
        }
        content = {
            "model": self._model_name,
            "messages": self._session.messages,
            "settings": settings,
        }
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        try:
            # "x" overwrites neither an existing file nor the target of a link.
            with open(path, "x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise OutputError(f"{path} already exists", "name another file: /save FILE") from None
        except OSError as e:
            raise OutputError(
                f"{path}: cannot be written: {e.strerror}", "name another file: /save FILE"
            ) from None
        _say(f"Saved in {path}")

    def _stats(self) -> str:
        session = self._session
        answers = session.answers
        new_tokens = sum(answer.new_tokens for answer in answers)
        rows = [("answers", f"{len(answers)}, {new_tokens} tokens")]
        if answers:
            last = answers[-1]
            speed = f", then {last.tokens_per_s:.2f} tokens/s" if last.tokens_per_s else ""
            used = last.prompt_tokens + last.new_tokens
            limit = f" of {session.context_tokens}" if session.context_tokens else ""
            rows = [
                ("context", f"{used}{limit} tokens, {session.turns} turns"),
                (
                    "last prompt",
                    f"{last.prompt_tokens} tokens, {last.reused_tokens} of them in the KV cache",
                ),
                (
                    "last answer",
                    f"{last.new_tokens} tokens, the first after {last.first_token_s:.2f} s{speed}",
                ),
                *rows,
            ]
        if self._model is not None:
            total = self._model.moe_stats().total
            read = format_size(total.bytes_read)
            rows.append(("expert cache", f"hit ratio {total.hit_ratio:.3f}, read {read}"))
        return table(rows, left=2)


def _say(text: str) -> None:
    click.echo(printable(text), err=True)
