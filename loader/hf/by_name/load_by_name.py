"""A converted folder or repository that a caller of transformers named, loaded as transformers'
arguments say.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats import INDEX_NAME
from formats.config.field_rules import short
from formats.config.generation_config import GENERATION_NAME
from formats.config.recorded_config import METHOD
from formats.errors import RecipeError
from formats.repair.unconverted import check_finished
from loader.hf.by_name.arguments import loader_options
from loader.model import from_pretrained

SETTABLE = (
    "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "output_router_logits", "output_attentions",
    "output_hidden_states", "return_dict",
)  # fmt: skip
"""Fields of a configuration that transformers reads at each call: a caller may give them other
values than the folder. The others are read while the model is built, from the folder's config.json.
"""

_COMPARED_OTHERWISE = ("dtype", "quantization_config")
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


@dataclass(frozen=True)
class NamedFolder:
    """The name of a converted model, with the configuration that the caller gave and the one that
    is there.
    """

    name: str
    given: Any
    there: Any

    @classmethod
    def of(
        cls, name: Any, config: Any, config_class: Any, kwargs: dict[str, Any]
    ) -> "NamedFolder | None":
        """None if `name` has no converted model. NotConvertedError if there is an unfinished one."""
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

    def load(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the model. RecipeError naming an argument or field that is not supported."""
        if args:
            raise RecipeError(f"{self.name}: a converted model takes keyword arguments only")
        changes = self._changes()
        generation = kwargs.pop("generation_config", None)
        options = loader_options(self.name, self.given, self.there, kwargs)
        model: Any = from_pretrained(self.name, **options)
        for field, value in changes.items():
            setattr(model.config, field, value)
        if kwargs.get("device_map") is not None:
            # As transformers does: pipelines and trainers then leave the model where it is.
            model.hf_device_map = {"": model.device}
        if generation is not None:
            model.generation_config = type(model.generation_config).from_dict(generation.to_dict())
        elif not (Path(model.name_or_path) / GENERATION_NAME).exists():
            for field in changes.keys() & set(_TOKENS):
                setattr(model.generation_config, field, changes[field])
        return model

    def _changes(self) -> dict[str, Any]:
        """The fields that the caller gave other values than config.json has. RecipeError for one
        that is read while the model is built.
        """
        given, there = self.given.to_dict(), self.there.to_dict()
        names = sorted((given.keys() | there.keys()) - set(_COMPARED_OTHERWISE))
        changes = {name: given.get(name) for name in names if given.get(name) != there.get(name)}
        for name, value in changes.items():
            if name not in SETTABLE and not name.startswith("_"):
                raise RecipeError(
                    f"{name}: {short(value)} is given, config.json of {self.name} has {short(there.get(name))}",
                    "a converted model is built as its config.json says: edit it (docs/security.md lists the fields)",
                )
        return changes


def _method(config: Any) -> Any:
    """The quant_method of a configuration; None if it has none."""
    quantization = getattr(config, "quantization_config", None)
    if isinstance(quantization, dict):
        return quantization.get("quant_method")
    return getattr(quantization, "quant_method", None)
