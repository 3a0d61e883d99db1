"""Runs a converted folder: a model of transformers whose experts come from the files, through a
cache.

import loader
model = loader.from_pretrained("mixtral-2bit", ram_cache="6GiB")
tokenizer = loader.load_tokenizer("mixtral-2bit")

After `import loader` transformers' AutoModelForCausalLM loads converted folders by name too
(docs/load.md).
"""

import importlib
from typing import TYPE_CHECKING, Any

from loader.hf.by_name.registration import register_with_transformers

if TYPE_CHECKING:
    from loader.default_options import defaults
    from loader.experts.stats import LayerStats, MoeStats
    from loader.model import from_pretrained, load_tokenizer

__all__ = ["LayerStats", "MoeStats", "defaults", "from_pretrained", "load_tokenizer"]

_MODULES = {
    "LayerStats": "loader.experts.stats",
    "MoeStats": "loader.experts.stats",
    "defaults": "loader.default_options",
    "from_pretrained": "loader.model",
    "load_tokenizer": "loader.model",
}
"""Public name -> its module, imported when the name is first used: torch and transformers take
seconds.
"""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


register_with_transformers()
