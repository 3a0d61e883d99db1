"""The loop of `moe-convert chat`: reads messages, runs slash commands, prints answers."""

import sys

import click

from converter.cli.chat.message_input import Lines, read_message
from converter.cli.chat.slash_commands import ChatCommands
from converter.cli.show.console import Output, Terminated
from converter.cli.show.failures import failure_of
from converter.cli.show.live_text import LiveText
from converter.cli.show.terminal import one_line
from formats.errors import MoeConvertError
from loader.serving.conversation import ChatAnswer, ContextFullError, Conversation


class ChatLoop:
    """Reads messages until the input ends. Answers go to stdout, everything else to stderr.

    At a terminal, an error or Ctrl-C ends only the current answer. With piped input it ends the
    command.
    """

    def __init__(
        self, session: Conversation, lines: Lines, commands: ChatCommands, output: Output
    ) -> None:
        self._session = session
        self._lines = lines
        self._commands = commands
        self._output = output
        self._is_stopped = False
        # Ends the line on which Ctrl-C was typed.
        self._line_end = "\n"

    def run(self) -> None:
        """Return when the user leaves."""
        while not self._commands.is_over:
            try:
                self._say_what_stopped()
                text = read_message(self._lines)
                if not self._is_handled(text):
                    self._answer(text)
            except EOFError:
                if self._lines.is_terminal:
                    click.echo(err=True)
                return
            except KeyboardInterrupt as e:
                if isinstance(e, Terminated) or not self._lines.is_terminal:
                    raise
                # Do nothing more here: a second Ctrl-C in this block would end the chat.
                self._is_stopped = True
            except MoeConvertError as e:
                if not self._lines.is_terminal:
                    raise
                self._report(e)

    def _say_what_stopped(self) -> None:
        if self._is_stopped:
            self._is_stopped = False
            click.echo(f"{self._line_end}(stopped; Ctrl-D leaves)", err=True)
        self._line_end = "\n"

    def _is_handled(self, text: str) -> bool:
        """Run a slash command or skip an empty line. False if `text` is a message to the model."""
        if not text.strip():
            return True
        if not text.startswith("/") or text.startswith("//"):
            return False
        self._commands.run(text)
        return True

    def _answer(self, text: str) -> None:
        # // begins a message whose first character is a slash.
        message = text[1:] if text.startswith("//") else text
        is_asked = True
        while is_asked:
            try:
                self._say_answer(self._ask(message))
                return
            except ContextFullError as e:
                is_asked = self._has_dropped(message, e)

    def _ask(self, message: str) -> ChatAnswer:
        shown = LiveText()
        before = len(self._session.answers)
        try:
            return self._session.ask(message, shown)
        finally:
            if len(self._session.answers) > before:
                shown.end()
                self._line_end = ""

    def _say_answer(self, answer: ChatAnswer) -> None:
        """Print why an answer was cut, if it was."""
        if answer.finish_reason != "length":
            return
        tokens = answer.new_tokens
        context = self._session.context_tokens
        if context is not None and answer.prompt_tokens + tokens >= context:
            self._output.note(f"(cut: the context of {context} tokens is full; /reset starts over)")
        else:
            self._output.note(f"(cut after {tokens} tokens, see --max-new-tokens)")

    def _has_dropped(self, message: str, error: ContextFullError) -> bool:
        """Report that the context is full and drop the oldest turns. True if they were dropped.

        At a terminal the user is asked first.
        """
        session = self._session
        count = session.turns_to_drop(message)
        if count is None:
            raise MoeConvertError(
                f"the message alone leaves no room for an answer: {error.message}",
                "send a shorter message, or lower --max-new-tokens",
            ) from error
        click.echo(f"{error.message}.", err=True)
        if self._lines.is_terminal and not self._agrees(
            f"Drop the oldest {count} of {session.turns} turns? [Y/n] "
        ):
            click.echo(
                "The message was not sent. /reset starts over, /save saves the conversation.",
                err=True,
            )
            return False
        session.drop(count)
        click.echo(f"Dropped the oldest {count} turns.", err=True)
        return True

    def _agrees(self, question: str) -> bool:
        return self._lines.read(question).strip().lower() in ("", "y", "yes")

    def _report(self, error: MoeConvertError) -> None:
        sys.stdout.flush()
        failure = failure_of(error)
        click.echo(f"error: {one_line(failure.message)}", err=True)
        if failure.hint:
            click.echo(f"  next: {one_line(failure.hint)}", err=True)
