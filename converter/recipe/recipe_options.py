"""The options of a recipe: typed here, a dict of names only in the index and the journal.

On disk, rules of bits are the options `rule.1`, `rule.2` …, in their order; what has its default is
not there.
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
"""Columns of down that make up for each other's errors: a multiple of 256, or all of them."""


class Calibration(Struct, frozen=True):
    """By which tokens the errors are weighed. kind: a key of KINDS, not "none"; tokens: how many."""

    kind: str
    tokens: int

    @classmethod
    def read(cls, recorded: Mapping[str, Option]) -> "Calibration | None":
        """From the names and values of an index, None without a calibration; RecipeError as
        `RecipeOptions.read`.
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
    """What a recipe says beside its packings and its solver. target_bpw: bits a weight for which
    calibration chooses the rules.
    """

    calibration: Calibration | None = None
    target_bpw: float | None = None
    down_width: DownWidth = DOWN_BLOCK
    rules: tuple[BitRule, ...] = ()

    @classmethod
    def read(cls, recorded: Mapping[str, Option]) -> "RecipeOptions":
        """From the names and values of an index. Names that this release does not know are left
        out.

        RecipeError naming the option whose value is not as here.
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
        """The names and values for an index."""
        found: dict[str, Option] = {}
        if self.calibration:
            found |= {
                "calibrate": self.calibration.kind,
                "calibration_tokens": self.calibration.tokens,
            }
        if self.target_bpw is not None:
            found["target_bpw"] = self.target_bpw
        if self.down_width != DOWN_BLOCK:
            found["down_width"] = self.down_width
        return found | {f"{_RULE}{number}": rule.text for number, rule in enumerate(self.rules, 1)}

    @property
    def calibration_tokens(self) -> int:
        """How many tokens the calibration has; 0 without one."""
        return self.calibration.tokens if self.calibration else 0

    @property
    def rules_are_open(self) -> bool:
        """True if calibration is yet to choose the rules."""
        return self.target_bpw is not None and not self.rules

    def down_block(self, columns: int) -> int:
        """Columns of a block of down's statistics, of `columns` in all: as asked, at most all, in
        whole superblocks.
        """
        most = -(-columns // DOWN_BLOCK) * DOWN_BLOCK
        return most if self.down_width == "full" else min(self.down_width, most)


def without_rules(recorded: Mapping[str, Option]) -> dict[str, Option]:
    """The names and values of an index, but for the rules of bits."""
    return {name: value for name, value in recorded.items() if not name.startswith(_RULE)}


def _rules(recorded: Mapping[str, Option]) -> tuple[BitRule, ...]:
    numbered: dict[int, BitRule] = {}
    for name, text in recorded.items():
        if not name.startswith(_RULE):
            continue
        number = name.removeprefix(_RULE)
        if not (number.isascii() and number.isdecimal() and isinstance(text, str)):
            _refuse(name, text, f"{_RULE}1, {_RULE}2 … with the text of a rule")
        (numbered[int(number)],) = _one_rule(name, text)
    return tuple(numbered[number] for number in sorted(numbered))


def _one_rule(name: str, text: str) -> list[BitRule]:
    rules = parse_rules(text)
    if len(rules) != 1:
        _refuse(name, text, "one rule of bits")
    return rules


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _refuse(name: str, value: Any, expected: str) -> NoReturn:
    raise RecipeError(
        f"recipe: option {name} is {short(value)}; expected is {expected}",
        "get the folder again from where it was published, or convert again",
    )
