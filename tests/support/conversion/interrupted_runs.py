"""Conversions that stop half-way, damage to their files, and the hashes of files."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from converter.conversion.worker import Worker
from converter.convert import ConvertOptions, convert_checkpoint
from converter.journal.keys import ExpertKey
from converter.recipe.recipes import make_recipe


def convert(source: Path, out: Path, recipe: str = "2bit", **options: Any) -> str:
    """Convert with hqq, the fastest solver. Calibrated tests have their own function."""
    return convert_checkpoint(
        source, out, make_recipe(recipe, solver="hqq"), ConvertOptions(**options)
    ).done


def hashes(out: Path, *, without_source: bool = False) -> dict[str, str]:
    result = {}
    for file in sorted(out.rglob("*")):
        if file.is_file():
            data = file.read_bytes()
            if without_source and file.name == "moe_index.json":
                index = json.loads(data)
                del index["source"]
                data = json.dumps(index).encode()
            result[str(file.relative_to(out))] = hashlib.sha256(data).hexdigest()
    return result


class Interruption(Exception):
    pass


def stop_after(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """Let a conversion fail when its n-th expert begins."""
    original, count = Worker.expert, iter(range(10**6))

    def expert(self: Worker, *args: Any) -> Any:
        if next(count) >= n:
            raise Interruption
        return original(self, *args)

    monkeypatch.setattr(Worker, "expert", expert)


def interrupted(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, n: int = 5, **options: Any
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, n)
        with pytest.raises(Interruption):
            convert(source, out, **options)


def converted_experts(
    monkeypatch: pytest.MonkeyPatch, conversion: Callable[[], Any]
) -> list[tuple[int, int]]:
    """Return the (layer, expert) that a conversion works on, in order."""
    done: list[tuple[int, int]] = []
    original = Worker.expert

    def expert(self: Worker, key: ExpertKey, calibrated: Any) -> Any:
        done.append((key.layer, key.expert))
        return original(self, key, calibrated)

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "expert", expert)
        conversion()
    return done


def flip(path: Path, position: int, bit: int = 0) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)
