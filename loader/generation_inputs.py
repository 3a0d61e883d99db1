"""What generate prepares between two tokens of one sequence, without copying what it has prepared before.

transformers copies the whole attention mask and all position numbers for each token, in a dozen operations of torch.
"""

import functools
import threading
from collections import OrderedDict
from ctypes import c_int64
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from loader.token_request import is_numbers
from loader.transformers_names import generation_methods

LEAST_COLUMNS = 256
_KNOWN = {"cache", "attention_mask", "position_ids", "use_cache"}


class GrowingRow(threading.local):
    """A tensor int64 [1, n] that grows in place: each is a view of the same memory, one column longer than the last.

    A row that is not the last one given, to this thread, begins new memory.
    """

    _memory: Tensor | None = None
    _shown = 0

    def appended(self, row: Tensor, value: int) -> Tensor:
        """`row`, int64 [1, n] on the CPU, and `value` behind it."""
        memory, columns = self._memory, row.shape[1]
        if (
            memory is None
            or row.data_ptr() != memory.data_ptr()
            or columns != self._shown
            or columns == memory.shape[1]
            or memory.is_inference() != torch.is_inference_mode_enabled()
        ):
            memory = self._memory = row.new_empty((1, max(LEAST_COLUMNS, 2 * columns)))
            memory[:, :columns] = row
        c_int64.from_address(memory.data_ptr() + 8 * columns).value = value
        self._shown = columns + 1
        return memory.narrow(1, 0, self._shown)


class GenerationInputs:
    """The two methods by which generate prepares a token, for one sequence over a plain DynamicCache: the values are
    those of transformers' own, which do everything else."""

    def __init__(self) -> None:
        self._mask, self._positions = GrowingRow(), GrowingRow()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A new one, for a copy of the model: what has grown belongs to this one's threads."""
        return GenerationInputs, ()

    def prepared(self, input_ids: Any, following: Any, values: dict[str, Any]) -> dict[str, Any] | None:
        """What prepare_inputs_for_generation gives for the last of `input_ids`, or None."""
        if following != 1 or not _is_row(input_ids) or not _is_simple(values):
            return None
        inputs: dict[str, Any] = {"input_ids": _last(input_ids), "cache": values["cache"]}
        if (positions := values.get("position_ids")) is not None:
            inputs["position_ids"] = _last(positions)
        if (mask := values.get("attention_mask")) is not None:
            inputs["attention_mask"] = mask
        if "use_cache" in values:
            inputs["use_cache"] = values["use_cache"]
        return inputs

    def updated(self, outputs: Any, values: dict[str, Any]) -> dict[str, Any] | None:
        """What _update_model_kwargs_for_generation makes of `values` after one token, or None."""
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
        is_numbers(value) and value.dim() == 2 and value.shape[0] == 1 and value.shape[1] > 0 and value.is_contiguous()
    )


def _is_simple(values: dict[str, Any]) -> bool:
    return (
        values.keys() <= _KNOWN
        and type(values.get("cache")) is DynamicCache
        and all(values.get(name) is None or _is_row(values[name]) for name in ("attention_mask", "position_ids"))
    )


def _last(row: Tensor) -> Tensor:
    return row.narrow_copy(1, row.shape[1] - 1, 1)


def prepare_tokens_in_place(model: nn.Module) -> None:
    """Gives `model` the methods of a `GenerationInputs`, if transformers has those that they stand for."""
    methods = generation_methods()
    if methods is None:
        return

    @functools.wraps(methods[0])
    def prepare(self: Any, input_ids: Any, next_sequence_length: Any = None, **values: Any) -> Any:
        quick = self._generation_inputs.prepared(input_ids, next_sequence_length, values)
        if quick is not None:
            return quick
        return type(self).prepare_inputs_for_generation(self, input_ids, next_sequence_length, **values)

    @functools.wraps(methods[1])
    def update(
        self: Any, outputs: Any, model_kwargs: Any, is_encoder_decoder: bool = False, num_new_tokens: int = 1
    ) -> Any:
        if num_new_tokens == 1 and not is_encoder_decoder:
            quick = self._generation_inputs.updated(outputs, model_kwargs)
            if quick is not None:
                return quick
        return type(self)._update_model_kwargs_for_generation(
            self, outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        )

    model.__dict__["_generation_inputs"] = GenerationInputs()
    model.__dict__["prepare_inputs_for_generation"] = MethodType(prepare, model)
    model.__dict__["_update_model_kwargs_for_generation"] = MethodType(update, model)
