"""Recognizes a call of the model that asks for one token's logits and nothing else."""

from ctypes import c_int64
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from loader.decode.path_counters import LeaveDecoder, Reason

_ONE = torch.Size((1, 1))
_CPU = torch.device("cpu")


@dataclass(slots=True)
class TokenRequest:
    """One token of one sequence over a plain DynamicCache.

    ids: int64 [1, 1]. positions: int64, one number each. All tensors are on one device.
    """

    ids: Tensor
    cache: DynamicCache
    mask: Tensor | None
    positions: list[Tensor]

    @classmethod
    def from_call(
        cls,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        config: Any,
        layers: int,
        device: torch.device = _CPU,
    ) -> "TokenRequest":
        """Return the request of a call of a causal model's forward with these arguments.

        layers: number of layers of the model. Raises LeaveDecoder if the call asks for more or for
        something else, or if its tensors are not on `device`.
        """
        if not is_single_token(args, kwargs):
            raise LeaveDecoder(Reason.PROMPT)
        ids: Any = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            raise LeaveDecoder(Reason.EMBEDDINGS)
        if len(args) > 1:
            raise LeaveDecoder(Reason.OUTPUTS, "arguments by position")
        if not is_numbers(ids, device):
            raise LeaveDecoder(Reason.POSITIONS, f"input_ids of {ids.dtype} on {ids.device}")
        _check_config(config, layers)
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
                    raise LeaveDecoder(Reason.OUTPUTS, f"logits_to_keep={value}")
            elif name == "return_dict":
                if value is not True:
                    raise LeaveDecoder(Reason.OUTPUTS, "return_dict=False")
            elif name == "inputs_embeds":
                raise LeaveDecoder(Reason.EMBEDDINGS)
            elif value is not False:
                raise LeaveDecoder(Reason.OUTPUTS, name)
        if not (kwargs.get("return_dict") or config_fields(config).get("return_dict")):
            raise LeaveDecoder(Reason.OUTPUTS, "return_dict=False")
        if not (config_fields(config).get("use_cache") if use_cache is None else use_cache):
            raise LeaveDecoder(Reason.KV_CACHE, "use_cache=False")
        if len(caches) != 1 or type(caches[0]) is not DynamicCache:
            raise LeaveDecoder(Reason.KV_CACHE, type(caches[0]).__name__)
        if not (mask is None or (type(mask) is Tensor and mask.device == device)):
            raise LeaveDecoder(Reason.POSITIONS, "attention_mask")
        if not all(is_numbers(number, device) and number.numel() == 1 for number in positions):
            raise LeaveDecoder(Reason.POSITIONS, "position_ids")
        return cls(ids, caches[0], mask, positions)

    def token_after(self, length: int) -> int:
        """Return the token's id.

        Raises LeaveDecoder unless the token comes after `length` positions, all of them unmasked.
        """
        if self.mask is not None and self.mask.shape != (1, length + 1):
            raise LeaveDecoder(
                Reason.POSITIONS, f"attention_mask {tuple(self.mask.shape)} for position {length}"
            )
        token, attended, *positions = (
            self._numbers() if self.ids.device.type == "cpu" else self._copied_numbers()
        )
        if not attended:
            raise LeaveDecoder(Reason.POSITIONS, "attention_mask with zeros")
        if not all(position == length for position in positions):
            raise LeaveDecoder(
                Reason.POSITIONS, f"position_ids {positions}, the KV cache has {length}"
            )
        return token

    def _numbers(self) -> list[int]:
        """Return the token, 1 if no position is masked, and the positions."""
        attended = self.mask is None or bool(self.mask.all())
        return [
            _number(self.ids),
            int(attended),
            *(_number(position) for position in self.positions),
        ]

    def _copied_numbers(self) -> list[int]:
        """Return `_numbers` of a GPU's tensors in one copy, the only wait except for experts."""
        attended = self.ids.new_ones(1) if self.mask is None else self.mask.all()
        parts = [one.reshape(1).to(torch.int64) for one in (self.ids, attended, *self.positions)]
        return torch.cat(parts).tolist()  # type: ignore[no-any-return]


def is_single_token(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True for one token of one sequence with a KV cache; without a cache the token is a prompt."""
    ids = args[0] if args else kwargs.get("input_ids")
    part = kwargs.get("inputs_embeds") if ids is None else ids
    return (
        isinstance(part, Tensor)
        and part.shape[:2] == _ONE
        and (
            len(args) > 1
            or kwargs.get("cache") is not None
            or kwargs.get("past_key_values") is not None
        )
    )


def is_numbers(value: Any, device: torch.device = _CPU) -> bool:
    """True if `value` is a plain int64 tensor on `device`."""
    return type(value) is Tensor and value.dtype is torch.int64 and value.device == device


def _number(one: Tensor) -> int:
    """Return the number in a CPU tensor of one element, 10 times as fast as through torch."""
    return c_int64.from_address(one.data_ptr()).value


def config_fields(config: Any) -> dict[str, Any]:
    """Return the fields of `config` as a dict: its attribute lookup costs 1 to 5 µs each."""
    fields: dict[str, Any] = object.__getattribute__(config, "__dict__")
    return fields


def _check_config(config: Any, layers: int) -> None:
    """Raise LeaveDecoder unless all `layers` run with full causal attention and record nothing.

    `output_router_logits` is allowed: it is for training (`loader.hf.decoder_path`).
    """
    fields = config_fields(config)
    if fields.get("sliding_window") is not None:
        raise LeaveDecoder(Reason.WINDOW)
    if fields.get("num_hidden_layers") != layers or fields.get("is_causal", True) is False:
        raise LeaveDecoder(Reason.REPLACED, "num_hidden_layers or is_causal of the configuration")
    for name in ("output_hidden_states", "output_attentions"):
        if fields.get(name):
            raise LeaveDecoder(Reason.OUTPUTS, f"{name} in the configuration")
