"""A conversation: its system message, turns and answers, whoever computes the answers."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

from formats.errors import MoeConvertError
from loader.serving.answers.settings import GenerationSettings
from loader.serving.prompts.chat_template import Message

OnText = Callable[[str], None]
"""Called with each new piece of text, which may be empty."""


class ContextFullError(MoeConvertError):
    """The conversation leaves no room for an answer in the context."""

    default_hint = "drop the oldest turns, or start over with /reset"


class ChatAnswer(Protocol):
    """An answer as a chat shows it: `loader.serving.answers.generation.Answer` implements this."""

    @property
    def text(self) -> str:
        """The answer."""

    @property
    def finish_reason(self) -> str:
        """Reason for the end of the answer; "length" if it was cut."""

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt in tokens."""

    @property
    def reused_tokens(self) -> int:
        """Tokens of the prompt that were in the KV cache."""

    @property
    def new_tokens(self) -> int:
        """Length of the answer in tokens."""

    @property
    def first_token_s(self) -> float | None:
        """Seconds until the first text; None without one."""

    @property
    def tokens_per_s(self) -> float | None:
        """Speed after the first text; None if it is unknown."""


class Conversation(ABC):
    """Questions and answers in turn, after an optional system message.

    context_tokens: maximum of prompt and answer together; None if it is unknown.
    """

    def __init__(
        self, settings: GenerationSettings, system: str, context_tokens: int | None
    ) -> None:
        self._system = system
        self._turns: list[tuple[Message, Message]] = []
        self.settings = settings
        self.context_tokens = context_tokens
        self.answers: list[ChatAnswer] = []
        """All answers of the session, in order."""

    @property
    def system(self) -> str:
        """The system message, or an empty string."""
        return self._system

    def set_system(self, text: str) -> None:
        """Set the system message and keep the turns."""
        self._system = text

    @property
    def messages(self) -> list[Message]:
        """The system message, then questions and answers in turn."""
        return self._messages(0)

    @property
    def turns(self) -> int:
        """Number of questions with an answer."""
        return len(self._turns)

    def drop(self, turns: int) -> None:
        """Forget the oldest `turns`."""
        del self._turns[:turns]

    def reset(self) -> None:
        """Forget all turns. System message and settings stay."""
        self._turns.clear()

    @abstractmethod
    def ask(self, text: str, on_text: OnText) -> ChatAnswer:
        """Answer `text` and add both to the conversation. on_text: receives the answer's pieces.

        If an exception interrupts the answer, its generated part is kept. ContextFullError if the
        conversation leaves no room for an answer.
        """

    @abstractmethod
    def turns_to_drop(self, text: str) -> int | None:
        """Return the number of oldest turns to drop so that an answer to `text` fits.

        None if `text` alone does not fit.
        """

    def _messages(self, dropped: int) -> list[Message]:
        """Return the messages without the oldest `dropped` turns."""
        system = [_message("system", self._system)] if self._system else []
        return system + [message for turn in self._turns[dropped:] for message in turn]

    def _with_question(self, text: str, dropped: int = 0) -> list[Message]:
        """Return the messages and the question `text`, without the oldest `dropped` turns."""
        return [*self._messages(dropped), _message("user", text)]

    def _add(self, text: str, answer: ChatAnswer) -> None:
        """Add the question `text` and its answer."""
        self.answers.append(answer)
        self._turns.append((_message("user", text), _message("assistant", answer.text)))


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
