"""transformers' conversion table: the model's tensor for each tensor of a checkpoint.

The table is private in transformers; no other file uses it.
"""

import re
from dataclasses import dataclass
from typing import Any

from formats.errors import SourceError
from formats.install import pip_install

_EXPERT = re.compile(r"\.experts\.([0-9]{1,9})\.")
# Old checkpoints store this buffer, in each layer or once; transformers computes it.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Target:
    """The tensor of the model that a checkpoint's tensor becomes, or a part of.

    expert: the expert whose part it is, None for a whole tensor. part: its number among the
    `parts` tensors that make up one expert of the model's tensor.
    """

    name: str
    expert: int | None = None
    part: int = 0
    parts: int = 1


class ConversionTable:
    """The conversions of one model.

    where: path of its config.json, for errors. SourceError if the installed transformers has no
    such table.
    """

    def __init__(self, model: Any, where: str) -> None:
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, rename_source_key
        except ImportError as e:
            raise _unknown_release(e) from e
        self._where = where
        transforms = get_model_conversion_mapping(model)
        self._rename = rename_source_key
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._tensors = model.state_dict()
        self._ignored = [
            re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()
        ]

    def target(self, name: str) -> Target | None:
        """Return the target of tensor `name`; None if transformers does not load it.

        A name that the table does not know is its own target. SourceError for a conversion other
        than a selection of experts and their projections.
        """
        if _COMPUTED.search(name):
            return None
        try:
            target, pattern = self._rename(
                name, self._renamings, self._converters, self._prefix, self._tensors
            )
        except (TypeError, ValueError) as e:
            raise _unknown_release(e) from e
        if pattern is None:
            return None if self._is_ignored(target) else Target(target)
        patterns = next(c.source_patterns for c in self._converters if pattern in c.source_patterns)
        expert = _EXPERT.search(name)
        if expert is None or len(patterns) > 2:
            raise SourceError(
                f"{self._where}: tensor {name} becomes {target} by a conversion that is not read",
                "use the original checkpoint",
            )
        return Target(target, int(expert[1]), patterns.index(pattern), len(patterns))

    def _is_ignored(self, target: str) -> bool:
        """True if transformers ignores the tensor when it loads a checkpoint."""
        if target in self._tensors:
            return False
        return any(pattern.search(target) for pattern in self._ignored)


def _unknown_release(error: Exception) -> SourceError:
    from transformers import __version__

    return SourceError(
        f"transformers {__version__} has no conversion table in the expected form: {error}",
        f"install a tested version: {pip_install('transformers>=5.3,<6')}",
    )
