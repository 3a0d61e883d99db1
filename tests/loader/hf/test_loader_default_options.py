"""`loader.defaults`: options for callers that cannot pass them."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import loader
from formats.errors import RecipeError

SMALL, LARGER = "3MiB", "4MiB"


@pytest.fixture(scope="module")
def folder(converted: Callable[[str], Path]) -> Path:
    return converted("2bit")


@pytest.fixture(scope="module")
def slots(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return budget -> slots of each layer."""
    return {
        size: loader.from_pretrained(folder, ram_cache=size).moe_stats().slots
        for size in (SMALL, LARGER)
    }


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, loader.from_pretrained])
def test_defaults_hold_inside_the_with_and_where_the_call_gives_nothing(
    folder: Path, slots: dict[str, tuple[int, ...]], load: Any
) -> None:
    with loader.defaults(ram_cache=SMALL):
        assert load(folder).moe_stats().slots == slots[SMALL]
        assert load(folder, ram_cache=LARGER).moe_stats().slots == slots[LARGER]
    assert set(load(folder).moe_stats().slots) == {8}


def test_an_inner_with_keeps_options_that_it_does_not_name(
    folder: Path, slots: dict[str, tuple[int, ...]]
) -> None:
    with loader.defaults(ram_cache=SMALL, prefetch=0):
        with loader.defaults(ram_cache=LARGER):
            inner = loader.from_pretrained(folder)
        outer = loader.from_pretrained(folder)
    assert (inner.moe_stats().slots, outer.moe_stats().slots) == (slots[LARGER], slots[SMALL])
    for model in (inner, outer):
        model.generate(torch.tensor([[1, 17, 300]]), max_new_tokens=3, pad_token_id=2)
        assert model.moe_stats().total.guesses == 0


def test_defaults_hold_in_tasks_and_not_in_other_threads(
    folder: Path, slots: dict[str, tuple[int, ...]]
) -> None:
    found = []

    def load() -> None:
        found.append(loader.from_pretrained(folder).moe_stats().slots)

    async def load_in_a_thread() -> None:
        await asyncio.to_thread(load)

    with loader.defaults(ram_cache=SMALL):
        asyncio.run(load_in_a_thread())
        thread = threading.Thread(target=load)
        thread.start()
        thread.join()
    assert found == [slots[SMALL], (8,) * 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ram_cache": "many"}, "ram_cache: 'many'"),
        ({"gpu_cache": 0}, "gpu_cache: 0"),
        ({"io": "fast"}, "io: 'fast' is unknown; known are auto, mmap, direct"),
        ({"policy": "random"}, "policy: 'random'"),
        ({"prefetch": -1}, "prefetch: -1"),
        ({"slots": 3}, "slots: 3"),
        ({"slots": [1, "2"]}, "slots:"),
        ({"device": "tpu"}, "device: 'tpu'"),
        ({"cpu_share": "half"}, "cpu_share: 'half'"),
        ({"check": "md5"}, "check: 'md5'"),
        ({"kernels": "fast"}, "kernels: 'fast'"),
    ],
    ids=str,
)
def test_a_wrong_value_is_named_before_anything_is_loaded(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        loader.defaults(**options)
