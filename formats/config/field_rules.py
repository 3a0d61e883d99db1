"""Rules for fields of a stranger's JSON: type, range, and the form that transformers takes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

Refuse = Callable[[str, str], NoReturn]
"""refuse(field name, message) raises the caller's error."""


class Rule(Protocol):
    """Accepts or refuses a value."""

    def take(self, value: Any) -> Any:
        """Return the value in transformers' form. Raises ValueError if it violates the rule."""

    def __str__(self) -> str:
        """Describe the accepted values, for messages."""


@dataclass(frozen=True)
class Integer:
    """An integer in a range, both ends included. Booleans and floats are refused."""

    minimum: int
    maximum: int

    def take(self, value: Any) -> Any:
        if type(value) is not int or not self.minimum <= value <= self.maximum:
            raise ValueError
        return value

    def __str__(self) -> str:
        return f"an integer from {self.minimum} to {self.maximum}"


@dataclass(frozen=True)
class Number:
    """An integer or a finite float in a range, both ends included.

    Integers become floats, because transformers' types are strict.
    """

    minimum: float
    maximum: float

    def take(self, value: Any) -> Any:
        if type(value) not in (int, float):
            raise ValueError
        # The range comes first: isfinite raises OverflowError for an integer of 400 digits.
        if not self.minimum <= value <= self.maximum or not math.isfinite(value):
            raise ValueError
        return float(value)

    def __str__(self) -> str:
        return f"a number from {self.minimum:g} to {self.maximum:g}"


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

    max_length: int = 64

    def take(self, value: Any) -> Any:
        if type(value) is not str or len(value) > self.max_length or not value.isprintable():
            raise ValueError
        return value

    def __str__(self) -> str:
        return f"a printable string of at most {self.max_length} characters"


@dataclass(frozen=True)
class ListOf:
    """A list of 1 to `max_length` values."""

    rule: Rule
    max_length: int

    def take(self, value: Any) -> Any:
        if type(value) is not list or not 1 <= len(value) <= self.max_length:
            raise ValueError
        return [self.rule.take(item) for item in value]

    def __str__(self) -> str:
        return f"a list of 1 to {self.max_length} values, each {self.rule}"


@dataclass(frozen=True)
class Either:
    """A value that satisfies one of two rules."""

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
    """Extend a rule to accept null."""
    return Either(rule, OneOf((None,)))


def take_field(name: str, value: Any, rule: Rule, refuse: Refuse) -> Any:
    """Return `value` in transformers' form. Calls `refuse` if it violates `rule`."""
    try:
        return rule.take(value)
    except ValueError:
        refuse(name, f"{name} is {short(value)}, expected {rule}")


def short(value: Any) -> str:
    """Format `value` for a message: one line of printable ASCII, at most 100 characters."""
    text = ascii(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
