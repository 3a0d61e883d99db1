"""Rules of a recipe that give some layers, experts or projections other bits.

As text: `0-3,28/down=3bit`, that is LAYERS[:EXPERTS][/PROJECTION]=BITS. Layers and experts are
numbers and ranges (both ends included), or `*`. A projection is gate_up or down; without one, the
rule is for both. Bits are 2bit, 3bit, 4bit, 16bit (as in the source), 2bit-scalar, 3bit-scalar, or
the name of a packing.
Commas separate rules. The last matching rule wins. The index stores each rule as an option `rule.N`
of the recipe (converter/recipe/recipe_options.py).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from formats.errors import RecipeError
from formats.packing import ALL_PACKINGS

BY_BITS = {2: "tile32-q2-g16-s4", 3: "tile32-q3-g32-s4", 4: "tile32-q4-g64-s8"}
"""Default packing for each number of bits. A later release may choose others."""

SCALAR = {"2bit-scalar": "tile32-q2-g16-s4", "3bit-scalar": "tile32-q3-g32-s4"}
"""Recipe's name -> the packing that it keeps when BY_BITS changes."""

UNPACKED = "none"
"""Stands for a packing: weights stay as in the source."""

PROJECTIONS = ("gate_up", "down")
_MAX_CHARACTERS = 512
"""Longest string that the index allows."""
_NUMBERS = r"\*|\d{1,4}(?:-\d{1,4})?(?:,\d{1,4}(?:-\d{1,4})?)*"
_RULE = re.compile(rf"({_NUMBERS})(?::({_NUMBERS}))?(?:/(\w+))?=([\w-]+)", re.ASCII)
_HINT = (
    "write LAYERS[:EXPERTS][/gate_up or /down]=2bit, 3bit, 4bit, 16bit or a packing,"
    " such as 0-3/down=3bit"
)

Ranges = tuple[tuple[int, int], ...]
"""(first, last) of each range, both included; empty for all."""


@dataclass(frozen=True)
class BitRule:
    """The packing, or UNPACKED, of some projections. text: the rule with the packing's name."""

    layers: Ranges
    experts: Ranges
    projections: tuple[str, ...]
    packing: str
    text: str

    def fits(self, layer: int, expert: int, projection: str) -> bool:
        """True if the rule is for this projection of this expert."""
        return (
            projection in self.projections
            and _in_ranges(layer, self.layers)
            and _in_ranges(expert, self.experts)
        )


def parse_rules(text: str) -> list[BitRule]:
    """Parse rules separated by commas. Raises RecipeError with the first invalid rule."""
    rules = []
    begin = 0
    while True:
        match = _RULE.match(text, begin)
        if not match or text[match.end() : match.end() + 1] not in ("", ","):
            raise RecipeError(f"{text[begin:][:100]!r} is no rule of bits", _HINT)
        rules.append(_parse_rule(match))
        if match.end() == len(text):
            return rules
        begin = match.end() + 1


def rule_for(layers: Sequence[int], projection: str, packing: str) -> BitRule:
    """Return the rule that gives a projection of some layers a packing.

    layers: ascending; empty for all.
    """
    text = f"{as_ranges(layers) or '*'}/{projection}={packing}"
    return BitRule(_merge(layers), (), (projection,), packing, text)


def as_ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers in the notation of rules, such as 0-3,7."""
    return ",".join(
        str(first) if first == last else f"{first}-{last}" for first, last in _merge(numbers)
    )


def _merge(numbers: Sequence[int]) -> Ranges:
    """Merge ascending numbers into ranges."""
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return tuple(ranges)


def _parse_rule(match: re.Match[str]) -> BitRule:
    layers, experts, projection, bits = match.groups()
    by_name = {f"{n}bit": name for n, name in BY_BITS.items()} | {"16bit": UNPACKED} | SCALAR
    known = (*by_name, *ALL_PACKINGS)
    if bits not in known:
        raise RecipeError(f"rule {match[0]}: {bits!r} is unknown; known are {', '.join(known)}")
    packing = by_name.get(bits, bits)
    if projection not in (None, *PROJECTIONS):
        raise RecipeError(
            f"rule {match[0]}: projection {projection!r} is unknown;"
            f" known are {', '.join(PROJECTIONS)}"
        )
    text = f"{match[0].rpartition('=')[0]}={bits if packing == UNPACKED else packing}"
    if len(text) > _MAX_CHARACTERS:
        raise RecipeError(
            f"rule {text[:60]}…: {len(text)} characters, at most {_MAX_CHARACTERS}",
            "split it into two rules",
        )
    projections = (projection,) if projection else PROJECTIONS
    return BitRule(
        _parse_ranges(layers, match[0]),
        _parse_ranges(experts, match[0]),
        projections,
        packing,
        text,
    )


def _parse_ranges(text: str | None, rule: str) -> Ranges:
    if text is None or text == "*":
        return ()
    pairs = [(int(a), int(b or a)) for a, _, b in (part.partition("-") for part in text.split(","))]
    for first, last in pairs:
        if first > last:
            raise RecipeError(f"rule {rule}: the range {first}-{last} is empty")
    return tuple(pairs)


def _in_ranges(number: int, ranges: Ranges) -> bool:
    return not ranges or any(first <= number <= last for first, last in ranges)
