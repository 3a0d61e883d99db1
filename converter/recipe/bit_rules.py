"""Rules of a recipe that give layers, experts or projections other bits than the rest.

As text: `0-3,28/down=3bit`, which is LAYERS[:EXPERTS][/PROJECTION]=BITS. Layers and experts are
numbers and ranges (both ends included), or `*`; a projection is gate_up or down, both if none is
named; bits are 2bit, 3bit, 4bit, 16bit (as in the source), or a packing by name. Several rules are
separated by commas, and of several that fit, the last counts. The index has each as an option
`rule.N` of its recipe (converter/recipe/recipe_options.py).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from formats.errors import RecipeError
from formats.packing import ALL_PACKINGS

BY_BITS = {2: "tile32-q2-g16-s4", 3: "tile32-q3-g32-s4", 4: "tile32-q4-g64-s8"}
"""What so many bits are where no packing is named."""

UNPACKED = "none"
"""In place of a packing: stored as in the source."""

PROJECTIONS = ("gate_up", "down")
_MOST_CHARACTERS = 512
"""Of a string in the index."""
_NUMBERS = r"\*|\d{1,4}(?:-\d{1,4})?(?:,\d{1,4}(?:-\d{1,4})?)*"
_RULE = re.compile(rf"({_NUMBERS})(?::({_NUMBERS}))?(?:/(\w+))?=([\w-]+)", re.ASCII)
_HINT = "such as 0-3/down=3bit: LAYERS[:EXPERTS][/gate_up or /down]=2bit, 3bit, 4bit, 16bit or a packing"


@dataclass(frozen=True)
class BitRule:
    """Which packing (or UNPACKED) some projections have. layers, experts: pairs of first and last;
    none for all. text: as above, with the packing's name.
    """

    layers: tuple[tuple[int, int], ...]
    experts: tuple[tuple[int, int], ...]
    projections: tuple[str, ...]
    packing: str
    text: str

    def fits(self, layer: int, expert: int, projection: str) -> bool:
        """Whether it is about this one."""
        return (
            projection in self.projections
            and _among(layer, self.layers)
            and _among(expert, self.experts)
        )


def parse_rules(text: str) -> list[BitRule]:
    """The rules in `text`, separated by commas. RecipeError names the rule that is none."""
    rules, begin = [], 0
    while True:
        match = _RULE.match(text, begin)
        if not match or text[match.end() : match.end() + 1] not in ("", ","):
            raise RecipeError(f"{text[begin:][:100]!r} is no rule of bits", _HINT)
        rules.append(_rule(match))
        if match.end() == len(text):
            return rules
        begin = match.end() + 1


def rule_for(layers: Sequence[int], projection: str, packing: str) -> BitRule:
    """The rule that gives a projection of some layers (ascending; none for all) a packing."""
    ranges = tuple(_runs(layers))
    text = f"{as_ranges(layers) or '*'}/{projection}={packing}"
    return BitRule(ranges, (), (projection,), packing, text)


def as_ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as a rule has them: 0-3,7."""
    return ",".join(
        str(first) if first == last else f"{first}-{last}" for first, last in _runs(numbers)
    )


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """(first, last) of each run of successive numbers."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs


def _rule(match: re.Match[str]) -> BitRule:
    layers, experts, projection, bits = match.groups()
    named = {f"{n}bit": name for n, name in BY_BITS.items()} | {"16bit": UNPACKED}
    known = (*named, *ALL_PACKINGS)
    if bits not in known:
        raise RecipeError(f"rule {match[0]}: {bits!r} is unknown; known are {', '.join(known)}")
    packing = named.get(bits, bits)
    if projection not in (None, *PROJECTIONS):
        raise RecipeError(
            f"rule {match[0]}: projection {projection!r} is none of {', '.join(PROJECTIONS)}"
        )
    text = f"{match[0].rpartition('=')[0]}={bits if packing == UNPACKED else packing}"
    if len(text) > _MOST_CHARACTERS:
        raise RecipeError(
            f"rule {text[:60]}…: {len(text)} characters, at most {_MOST_CHARACTERS}",
            "make two of it",
        )
    projections = (projection,) if projection else PROJECTIONS
    return BitRule(
        _ranges(layers, match[0]), _ranges(experts, match[0]), projections, packing, text
    )


def _ranges(text: str | None, rule: str) -> tuple[tuple[int, int], ...]:
    if text in (None, "*"):
        return ()
    assert text
    pairs = [(int(a), int(b or a)) for a, _, b in (part.partition("-") for part in text.split(","))]
    for first, last in pairs:
        if first > last:
            raise RecipeError(f"rule {rule}: the range {first}-{last} is empty")
    return tuple(pairs)


def _among(number: int, ranges: tuple[tuple[int, int], ...]) -> bool:
    return not ranges or any(first <= number <= last for first, last in ranges)
