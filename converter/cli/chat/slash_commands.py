"""The commands of a chat that begin with a slash."""

import dataclasses
import difflib
import json
import time
from pathlib import Path
from typing import Any

import click

from converter.cli.show.console import gigabytes, table
from converter.cli.show.terminal import printable
from formats.errors import MoeConvertError, OutputError
from loader.serving.session import Session

HELP = {
    "/reset": "forget the conversation; the system message stays",
    "/save": "[FILE]  write the conversation as JSON",
    "/system": "[TEXT]  show the system message, or set it; - removes it",
    "/stats": "tokens, speed and expert cache until now",
    "/help": "this list",
    "/exit": "leave, as Ctrl-D",
}
"""Command → what it does."""

MORE_HELP = """\
Ctrl-C stops the answer. A line that ends with \\ goes on; \"\"\" begins and ends a message of several lines;
lines that are pasted together are one message. // begins a message with a slash."""


class ChatCommands:
    """Runs a slash command on `session`. What it says goes to stderr. model_name: for files that it
    writes.
    """

    def __init__(self, session: Session, model: Any, model_name: str) -> None:
        self._session = session
        self._model = model
        self._model_name = model_name
        self.is_over = False
        """True after /exit."""

    def run(self, line: str) -> None:
        """Run the command in `line`. MoeConvertError if there is none of this name, or it fails."""
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        match name:
            case "/reset":
                self._session.reset()
                _say("The conversation begins anew.")
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
                    f"there is no command {name}", f"did you mean {near[0]}?" if near else "/help"
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
            # "x": neither an older file nor the target of a link is overwritten.
            with open(path, "x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise OutputError(f"{path} is there already", "name another file: /save FILE") from None
        except OSError as e:
            raise OutputError(
                f"{path}: cannot be written: {e.strerror}", "name another file: /save FILE"
            ) from None
        _say(f"Saved in {path}")

    def _stats(self) -> str:
        session, total = self._session, self._model.moe_stats().total
        answers = session.answers
        new_tokens = sum(len(answer.token_ids) for answer in answers)
        rows = [("answers", f"{len(answers)}, {new_tokens} tokens")]
        if answers:
            last = answers[-1]
            speed = f", then {last.tokens_per_s:.2f} tokens/s" if last.tokens_per_s else ""
            used = last.prompt_tokens + len(last.token_ids)
            rows = [
                ("context", f"{used} of {session.context_tokens} tokens, {session.turns} turns"),
                (
                    "last prompt",
                    f"{last.prompt_tokens} tokens, {last.reused_tokens} of them in the KV cache",
                ),
                (
                    "last answer",
                    f"{len(last.token_ids)} tokens, the first after {last.first_token_s:.2f} s{speed}",
                ),
                *rows,
            ]
        rows.append(
            ("expert cache", f"hit ratio {total.hit_ratio:.3f}, read {gigabytes(total.bytes_read)}")
        )
        return table(rows, left=2)


def _say(text: str) -> None:
    click.echo(printable(text), err=True)
