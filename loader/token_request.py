"""A call of the model that asks for one token's logits and for nothing else."""

from ctypes import c_int64
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

_ONE = torch.Size((1, 1))
_CPU = torch.device("cpu")
_RECORDED = "output_router_logits", "output_hidden_states", "output_attentions", "_output_attentions"


@dataclass(slots=True)
class TokenRequest:
    """One token of one sequence over a plain DynamicCache. `ids` int64 [1, 1]; positions: int64, one number each; all
    on one device."""

    ids: Tensor
    cache: DynamicCache
    mask: Tensor | None
    positions: list[Tensor]

    @classmethod
    def of(
        cls, args: tuple[Any, ...], kwargs: dict[str, Any], config: Any, layers: int, device: torch.device = _CPU
    ) -> "TokenRequest | None":
        """What these arguments of MixtralForCausalLM.forward ask for, None if it is more or something else, or if they
        are not on `device`."""
        ids: Any = args[0] if args else kwargs.get("input_ids")
        if len(args) > 1 or not is_numbers(ids, device) or ids.shape != _ONE or not _is_plain(config, layers):
            return None
        mask, positions, caches, use_cache = None, [], [], None
        for name, value in kwargs.items():
            if value is None or name == "input_ids":
                continue
            if name == "attention_mask":
                mask = value
            elif name in ("cache", "past_key_values"):
                caches.append(value)
            elif name in ("position_ids", "cache_position"):
                positions.append(value)
            elif name == "use_cache":
                use_cache = value
            elif name == "logits_to_keep":
                if type(value) is not int or value < 0:
                    return None
            elif name == "return_dict":
                if value is not True:
                    return None
            elif value is not False:
                return None
        if (
            len(caches) != 1
            or type(caches[0]) is not DynamicCache
            or not (_settings(config).get("use_cache") if use_cache is None else use_cache)
            or not (kwargs.get("return_dict") or _settings(config).get("return_dict"))
            or not (mask is None or (type(mask) is Tensor and mask.device == device))
            or not all(is_numbers(number, device) and number.numel() == 1 for number in positions)
        ):
            return None
        return cls(ids, caches[0], mask, positions)

    def token_after(self, length: int) -> int | None:
        """The token, if it simply follows `length` positions that are all attended to."""
        if self.mask is not None and self.mask.shape != (1, length + 1):
            return None
        token, attended, *positions = self._numbers() if self.ids.device.type == "cpu" else self._copied_numbers()
        return token if attended and all(position == length for position in positions) else None

    def _numbers(self) -> list[int]:
        """The token, whether the mask attends to everything, and the positions."""
        attended = self.mask is None or bool(self.mask.all())
        return [_number(self.ids), int(attended), *(_number(position) for position in self.positions)]

    def _copied_numbers(self) -> list[int]:
        """The same from a GPU, in one copy: the one time that a token makes the host wait for more than experts."""
        attended = self.ids.new_ones(1) if self.mask is None else self.mask.all()
        parts = [one.reshape(1).to(torch.int64) for one in (self.ids, attended, *self.positions)]
        return torch.cat(parts).tolist()  # type: ignore[no-any-return]


def is_numbers(value: Any, device: torch.device = _CPU) -> bool:
    """Whether `value` is a plain int64 tensor on `device`."""
    return type(value) is Tensor and value.dtype is torch.int64 and value.device == device


def _number(one: Tensor) -> int:
    """The number in a tensor of one, on the CPU; without torch's dispatcher, which costs 10 times as much."""
    return c_int64.from_address(one.data_ptr()).value


def _settings(config: Any) -> dict[str, Any]:
    """config's own fields, without the Python that its attributes run through (1 to 5 µs each)."""
    fields: dict[str, Any] = object.__getattribute__(config, "__dict__")
    return fields


def _is_plain(config: Any, layers: int) -> bool:
    """Whether the configuration has all of `layers`, full causal attention, and nothing recorded."""
    fields = _settings(config)
    return (
        fields.get("num_hidden_layers") == layers
        and fields.get("sliding_window") is None
        and fields.get("is_causal", True) is not False
        and not any(fields.get(name) for name in _RECORDED)
    )
