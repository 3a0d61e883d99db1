"""The model types that have a decoder, each with its spec."""

from typing import Any, Protocol

import torch

from loader.decode import mixtral
from loader.decode.path_counters import LeaveDecoder, Reason
from loader.decode.weights import ModelWeights, Signature
from loader.experts.cache import ExpertSource


class Spec(Protocol):
    """The places of a model type's weights and settings. `loader/decode/mixtral.py` is one spec."""

    def check_modules(self, model: Any) -> None:
        """Raise LeaveDecoder unless `model` has unchanged modules over one cache."""

    def has_own_forward(self) -> bool:
        """True if the forward of transformers' class was not replaced."""

    def experts_of(self, model: Any) -> ExpertSource:
        """Return the cache of the model's experts."""

    def signature(self, model: Any) -> Signature:
        """Return the signature of the weights and settings that `read_weights` reads."""

    def read_weights(self, model: Any, device: torch.device) -> ModelWeights:
        """Return the present weights. LeaveDecoder naming the first unreadable module."""


SPECS: dict[str, Spec] = {"mixtral": mixtral}
"""`model_type` of the configuration -> spec."""


def spec_of(model: Any) -> Spec:
    """Return the spec of a model. LeaveDecoder if its model type has no decoder."""
    model_type = model.config.model_type
    if model_type not in SPECS:
        raise LeaveDecoder(Reason.FAMILY, f"{model_type} has no decoder yet")
    return SPECS[model_type]
