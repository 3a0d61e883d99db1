"""Model types that have a decoder: where each keeps the weights and settings that the decoder
reads.
"""

from typing import Any, Protocol

import torch

from loader.decode import mixtral
from loader.decode.path_counters import LeaveDecoder, Reason
from loader.decode.weights import ModelWeights, Signature
from loader.experts.cache import ExpertSource


class Spec(Protocol):
    """One model type's modules, as transformers names them; `loader/decode/mixtral.py` is one."""

    def check_modules(self, model: Any) -> None:
        """LeaveDecoder unless `model` has the modules that the plugin puts in, over one cache."""

    def has_own_forward(self) -> bool:
        """True if nobody has replaced the forward of transformers' class."""

    def experts_of(self, model: Any) -> ExpertSource:
        """Return the cache from which the experts come."""

    def signature(self, model: Any) -> Signature:
        """Return the weights and settings that `read_weights` reads."""

    def read_weights(self, model: Any, device: torch.device) -> ModelWeights:
        """Return the present weights. LeaveDecoder naming the first module that the decoder cannot
        read.
        """


SPECS: dict[str, Spec] = {"mixtral": mixtral}
"""Spec by the configuration's `model_type`."""


def spec_of(model: Any) -> Spec:
    """Return the spec of a model. LeaveDecoder if its model type has no decoder."""
    model_type = model.config.model_type
    if model_type not in SPECS:
        raise LeaveDecoder(Reason.FAMILY, f"{model_type} has no decoder yet")
    return SPECS[model_type]
