"""The options of a recipe: typed here, names and values in index and journal.

On disk, bit rules are the options `rule.1`, `rule.2` …, in order. Options with their default value
are not stored.
"""

from collections.abc import Mapping
from typing import Any, Literal, NoReturn

from msgspec import Struct

from converter.calibration.calibration_text import KINDS
from converter.calibration.layer_statistics import DOWN_BLOCK
from converter.recipe.bit_rules import BitRule, parse_rules
from formats.config.field_rules import short
from formats.errors import RecipeError
from formats.index import Option

_RULE = "rule."

DownWidth = int | Literal["full"]
"""Columns of down that compensate each other's errors: a multiple of 256, or "full"."""


class Calibration(Struct, frozen=True):
    """Calibration tokens. kind: one of KINDS but "none". tokens: their number."""

    kind: str
    tokens: int

    @classmethod
    def read(cls, recorded: Mapping[str, Option]) -> "Calibration | None":
        """Return the calibration in an index's options, None if there is none.

        Raises RecipeError as `RecipeOptions.read`.
        """
        kind, tokens = recorded.get("calibrate"), recorded.get("calibration_tokens")
        if kind is None and tokens is None:
            return None
        known = [name for name in KINDS if name != "none"]
        if kind not in known:
            _refuse("calibrate", kind, " or ".join(known))
        if not _is_count(tokens):
            _refuse("calibration_tokens", tokens, "a number of tokens")
        return cls(kind, tokens)  # type: ignore[arg-type]


class RecipeOptions(Struct, frozen=True):
    """Settings of a recipe beside packings and solver.

    target_bpw: bits per expert weight; calibration chooses rules that meet it.
    """

    calibration: Calibration | None = None
    target_bpw: float | None = None
    down_width: DownWidth = DOWN_BLOCK
    rules: tuple[BitRule, ...] = ()

    @classmethod
    def read(cls, recorded: Mapping[str, Option]) -> "RecipeOptions":
        """Return the options in an index; unknown names are ignored.

        Raises RecipeError with the first option whose value has the wrong type or range.
        """
        target = recorded.get("target_bpw")
        if target is not None and (isinstance(target, bool) or not isinstance(target, int | float)):
            _refuse("target_bpw", target, "a number")
        width = recorded.get("down_width", DOWN_BLOCK)
        if width != "full" and not _is_count(width):
            _refuse("down_width", width, "a number of columns, or full")
        return cls(
            calibration=Calibration.read(recorded),
            target_bpw=None if target is None else float(target),
            down_width=width,  # type: ignore[arg-type]
            rules=_rules(recorded),
        )

    @property
    def recorded(self) -> dict[str, Option]:
        """Names and values for an index."""
        options: dict[str, Option] = {}
        if self.calibration:
            options |= {
                "calibrate": self.calibration.kind,
                "calibration_tokens": self.calibration.tokens,
            }
        if self.target_bpw is not None:
            options["target_bpw"] = self.target_bpw
        if self.down_width != DOWN_BLOCK:
            options["down_width"] = self.down_width
        rules = {f"{_RULE}{number}": rule.text for number, rule in enumerate(self.rules, 1)}
        return options | rules

    @property
    def calibration_tokens(self) -> int:
        """Number of calibration tokens; 0 without calibration."""
        return self.calibration.tokens if self.calibration else 0

    @property
    def rules_are_open(self) -> bool:
        """True if calibration has yet to choose the rules."""
        return self.target_bpw is not None and not self.rules

    def down_block(self, columns: int) -> int:
        """Return the width of a block of down's statistics for `columns` columns.

        It is down_width, but at most `columns` rounded up to whole superblocks.
        """
        full = -(-columns // DOWN_BLOCK) * DOWN_BLOCK
        return full if self.down_width == "full" else min(self.down_width, full)


def without_rules(recorded: Mapping[str, Option]) -> dict[str, Option]:
    """Return an index's options without the bit rules."""
    return {name: value for name, value in recorded.items() if not name.startswith(_RULE)}


def _rules(recorded: Mapping[str, Option]) -> tuple[BitRule, ...]:
    numbered: dict[int, BitRule] = {}
    for name, text in recorded.items():
        if not name.startswith(_RULE):
            continue
        number = name.removeprefix(_RULE)
        if not (number.isascii() and number.isdecimal() and isinstance(text, str)):
            _refuse(name, text, f"{_RULE}1, {_RULE}2 … with a rule as text")
        (numbered[int(number)],) = _one_rule(name, text)
    return tuple(numbered[number] for number in sorted(numbered))


def _one_rule(name: str, text: str) -> list[BitRule]:
    rules = parse_rules(text)
    if len(rules) != 1:
        _refuse(name, text, "one bit rule")
    return rules


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _refuse(name: str, value: Any, expected: str) -> NoReturn:
    raise RecipeError(
        f"recipe: option {name} is {short(value)}, expected {expected}",
        "download the folder again, or convert again",
    )
