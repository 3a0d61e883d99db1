"""Rules for fields of a stranger's JSON: type, range, and the form in which transformers takes the
value.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

Refuse = Callable[[str, str], NoReturn]
"""Raises the caller's error for a field: called with its name and the finding."""


class Rule(Protocol):
    """Accepts a value, or refuses it."""

    def take(self, value: Any) -> Any:
        """The value in transformers' form. Raises ValueError if it breaks the rule."""

    def __str__(self) -> str:
        """What is expected, for messages."""


@dataclass(frozen=True)
class Integer:
    """An integer in a range; no boolean, no float."""

    least: int
    most: int

    def take(self, value: Any) -> Any:
        if type(value) is not int or not self.least <= value <= self.most:
            raise ValueError
        return value

    def __str__(self) -> str:
        return f"an integer from {self.least} to {self.most}"


@dataclass(frozen=True)
class Number:
    """An integer or a finite float in a range; taken as a float, because transformers' types are
    strict.
    """

    least: float
    most: float

    def take(self, value: Any) -> Any:
        if (
            type(value) not in (int, float)
            or not self.least <= value <= self.most
            or not math.isfinite(value)
        ):
            raise ValueError
        return float(value)

    def __str__(self) -> str:
        return f"a number from {self.least:g} to {self.most:g}"


@dataclass(frozen=True)
class Flag:
    """true or false."""

    def take(self, value: Any) -> Any:
        if type(value) is not bool:
            raise ValueError
        return value

    def __str__(self) -> str:
        return "true or false"


@dataclass(frozen=True)
class OneOf:
    """One of a few values."""

    values: tuple[Any, ...]

    def take(self, value: Any) -> Any:
        if not any(type(value) is type(known) and value == known for known in self.values):
            raise ValueError
        return value

    def __str__(self) -> str:
        return " or ".join(repr(value) for value in self.values)


@dataclass(frozen=True)
class Text:
    """A short printable string."""

    most: int = 64

    def take(self, value: Any) -> Any:
        if type(value) is not str or len(value) > self.most or not value.isprintable():
            raise ValueError
        return value

    def __str__(self) -> str:
        return f"a printable string of at most {self.most} characters"


@dataclass(frozen=True)
class ListOf:
    """A list of at most `most` values, one at least."""

    rule: Rule
    most: int

    def take(self, value: Any) -> Any:
        if type(value) is not list or not 1 <= len(value) <= self.most:
            raise ValueError
        return [self.rule.take(item) for item in value]

    def __str__(self) -> str:
        return f"a list of 1 to {self.most} values, each {self.rule}"


@dataclass(frozen=True)
class Either:
    """A value that one of two rules takes."""

    first: Rule
    second: Rule

    def take(self, value: Any) -> Any:
        try:
            return self.first.take(value)
        except ValueError:
            return self.second.take(value)

    def __str__(self) -> str:
        return f"{self.first}, or {self.second}"


def optional(rule: Rule) -> Rule:
    """The rule that takes null too."""
    return Either(rule, OneOf((None,)))


def take_field(name: str, value: Any, rule: Rule, refuse: Refuse) -> Any:
    """`value` in transformers' form; calls `refuse` if it breaks `rule`."""
    try:
        return rule.take(value)
    except ValueError:
        refuse(name, f"{name} is {short(value)}, expected is {rule}")


def short(value: Any) -> str:
    """`value` for a message: one line of printable ASCII, bounded in length."""
    text = ascii(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
