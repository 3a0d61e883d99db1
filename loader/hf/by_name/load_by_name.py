"""Loads a converted folder or repository that was named in a call of transformers."""

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats import INDEX_NAME
from formats.config.field_rules import short
from formats.config.generation_config import GENERATION_NAME
from formats.config.recorded_config import METHOD
from formats.errors import RecipeError
from formats.unconverted import check_finished
from loader.hf.by_name.arguments import loader_options

SETTABLE = (
    "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "output_router_logits",
    "output_attentions", "output_hidden_states", "return_dict",
)  # fmt: skip
"""Config fields that transformers reads at each call. The caller may change them. All other fields
are read while the model is built, from the folder's config.json.
"""

_COMPARED_BY_ARGUMENTS = ("dtype", "quantization_config")
"""Fields that `loader_options` compares."""
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


@dataclass(frozen=True)
class NamedFolder:
    """The name of a converted model, the caller's configuration and the stored configuration."""

    name: str
    given: Any
    stored: Any

    @classmethod
    def from_call(
        cls, name: Any, config: Any, config_class: Any, kwargs: dict[str, Any]
    ) -> "NamedFolder | None":
        """Return the folder of a call of from_pretrained; None if `name` is not a converted model.

        Raises NotConvertedError for a folder whose conversion did not finish.
        """
        if not isinstance(name, str | os.PathLike):
            return None
        folder = Path(name)
        if folder.is_dir():
            check_finished(folder)
        known = {key: kwargs[key] for key in ("revision", "token") if key in kwargs}
        if config is None:
            config = config_class.from_pretrained(name, **known)
        if _method(config) != METHOD and not (folder / INDEX_NAME).exists():
            return None
        return cls(os.fspath(name), config, config_class.from_pretrained(name, **known))

    def load(
        self, from_pretrained: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return the model that `from_pretrained`, the loader's function, loads.

        Raises RecipeError naming an argument or config field that is not supported.
        """
        if args:
            raise RecipeError(
                f"{self.name}: a converted model takes no positional arguments",
                "give all arguments after the name as keywords",
            )
        changes = self._changes()
        generation = kwargs.pop("generation_config", None)
        known = [name for name in inspect.signature(from_pretrained).parameters if name != "folder"]
        options = loader_options(self.name, self.given, self.stored, kwargs, known)
        model = from_pretrained(self.name, **options)
        for field, value in changes.items():
            setattr(model.config, field, value)
        if kwargs.get("device_map") is not None:
            # transformers sets this too. Pipelines and trainers then do not move the model.
            model.hf_device_map = {"": model.device}
        if generation is not None:
            model.generation_config = type(model.generation_config).from_dict(generation.to_dict())
        elif not (Path(model.name_or_path) / GENERATION_NAME).exists():
            for field in changes.keys() & set(_TOKENS):
                setattr(model.generation_config, field, changes[field])
        return model

    def _changes(self) -> dict[str, Any]:
        """Return the fields whose value differs between the caller's configuration and config.json.

        Raises RecipeError for a field outside SETTABLE.
        """
        given = self.given.to_dict()
        stored = self.stored.to_dict()
        names = sorted((given.keys() | stored.keys()) - set(_COMPARED_BY_ARGUMENTS))
        changes = {name: given.get(name) for name in names if given.get(name) != stored.get(name)}
        for name, value in changes.items():
            if name not in SETTABLE and not name.startswith("_"):
                raise RecipeError(
                    f"{name}: {short(value)} is given, config.json of {self.name} has"
                    f" {short(stored.get(name))}",
                    "a converted model is built from its config.json: edit it"
                    " (docs/security.md lists the fields)",
                )
        return changes


def _method(config: Any) -> Any:
    """Return the quant_method of a configuration, or None."""
    quantization = getattr(config, "quantization_config", None)
    if isinstance(quantization, dict):
        return quantization.get("quant_method")
    return getattr(quantization, "quant_method", None)
