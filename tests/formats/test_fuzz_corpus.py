"""The corpora of the fuzz targets, some seeded mutations, and all inputs that fuzzing once
reported.
"""

import random
from pathlib import Path

import pytest
from fuzz.run import FOUND
from fuzz.targets import TARGETS, Target, mutate_json

MUTATIONS = 60
"""Number of mutations for each target; `make fuzz` tries as many as its time allows."""

every_target = pytest.mark.parametrize("name", TARGETS)


@pytest.fixture
def target(name: str, tmp_path: Path) -> Target:
    return TARGETS[name](tmp_path)


@every_target
def test_good_and_bad_inputs_raise_only_our_errors(target: Target) -> None:
    accepted = [target.run(data) for data in target.corpus]
    assert any(accepted), "a corpus without a valid input reaches little of the parser"


@every_target
def test_mutated_inputs_raise_only_our_errors(name: str, target: Target) -> None:
    seeds = random.Random(name)
    for number in range(MUTATIONS):
        data = target.corpus[number % len(target.corpus)]
        begin, (line, newline, rest) = (
            data[: target.prefix_bytes],
            data[target.prefix_bytes :].partition(b"\n"),
        )
        mutated = mutate_json(line, seeds.getrandbits(32))
        if mutated is None:
            flipped = bytearray(data or b"{")
            flipped[seeds.randrange(len(flipped))] ^= 1 << seeds.randrange(8)
            target.run(bytes(flipped))
        else:
            target.run(begin + mutated + newline + rest)


@pytest.mark.parametrize(
    "path", sorted(FOUND.glob("*/*")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_input_that_fuzzing_found_raises_only_our_errors(path: Path, tmp_path: Path) -> None:
    TARGETS[path.parent.name](tmp_path).run(path.read_bytes())


def test_json_pretty_printed_over_many_lines_is_mutated_as_a_whole() -> None:
    assert mutate_json(b'{"a": [1, 2]}', 1) not in (None, b'{"a": [1, 2]}')
