"""Prepares generate's inputs for the next token of one sequence without copying earlier ones.

transformers copies the whole attention mask and all position numbers for each token, in a dozen
torch operations.
"""

import threading
from collections import OrderedDict
from ctypes import c_int64
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from loader.decode.decoder_call import is_numbers

MIN_COLUMNS = 256
_KNOWN = {"cache", "attention_mask", "position_ids", "use_cache"}


class GrowingRow(threading.local):
    """An int64 tensor [1, n] that grows in place.

    Each result is a view of the same memory, one column longer than the result before it. A row
    that is not this thread's latest result starts new memory.
    """

    _memory: Tensor | None = None
    _used = 0
    """Columns of the memory that the latest result shows."""

    def appended(self, row: Tensor, value: int) -> Tensor:
        """Return `row`, int64 [1, n] on the CPU, extended by `value`."""
        memory = self._memory
        columns = row.shape[1]
        if (
            memory is None
            or row.data_ptr() != memory.data_ptr()
            or columns != self._used
            or columns == memory.shape[1]
            or memory.is_inference() != torch.is_inference_mode_enabled()
        ):
            memory = row.new_empty((1, max(MIN_COLUMNS, 2 * columns)))
            memory[:, :columns] = row
            self._memory = memory
        c_int64.from_address(memory.data_ptr() + 8 * columns).value = value
        self._used = columns + 1
        return memory.narrow(1, 0, self._used)


class GenerationInputs:
    """A faster version of the two methods with which generate prepares a token.

    It handles one sequence over a plain DynamicCache and returns transformers' values. For all
    other calls it returns None, and transformers' own methods run.
    """

    def __init__(self) -> None:
        self._mask = GrowingRow()
        self._positions = GrowingRow()

    def prepared(
        self, input_ids: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Return the result of prepare_inputs_for_generation(input_ids, *args, **kwargs), or None.

        Handles calls with next_sequence_length=1 only.
        """
        values = {name: value for name, value in kwargs.items() if name != "next_sequence_length"}
        if (
            args
            or kwargs.get("next_sequence_length") != 1
            or not _is_row(input_ids)
            or not _is_simple(values)
        ):
            return None
        inputs: dict[str, Any] = {"input_ids": _last(input_ids), "cache": values["cache"]}
        if (positions := values.get("position_ids")) is not None:
            inputs["position_ids"] = _last(positions)
        if (mask := values.get("attention_mask")) is not None:
            inputs["attention_mask"] = mask
        if "use_cache" in values:
            inputs["use_cache"] = values["use_cache"]
        return inputs

    def updated(
        self, outputs: Any, values: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Return the result of `private_names.UPDATE_METHOD`, or None.

        outputs: the model's output for one token. values: the keyword arguments to extend.
        """
        if args or kwargs.get("is_encoder_decoder") or kwargs.get("num_new_tokens", 1) != 1:
            return None
        cache = OrderedDict.get(outputs, "cache")
        if cache is None or not _is_simple({**values, "cache": cache}):
            return None
        values["cache"] = cache
        if (positions := values.get("position_ids")) is not None:
            last = c_int64.from_address(positions.data_ptr() + 8 * (positions.shape[1] - 1)).value
            values["position_ids"] = self._positions.appended(positions, last + 1)
        if (mask := values.get("attention_mask")) is not None:
            values["attention_mask"] = self._mask.appended(mask, 1)
        return values


def _is_row(value: Any) -> bool:
    return (
        is_numbers(value)
        and value.dim() == 2
        and value.shape[0] == 1
        and value.shape[1] > 0
        and value.is_contiguous()
    )


def _is_simple(values: dict[str, Any]) -> bool:
    return (
        values.keys() <= _KNOWN
        and type(values.get("cache")) is DynamicCache
        and all(
            values.get(name) is None or _is_row(values[name])
            for name in ("attention_mask", "position_ids")
        )
    )


def _last(row: Tensor) -> Tensor:
    return row.narrow_copy(1, row.shape[1] - 1, 1)
