"""Loads converted folders as transformers models that read their experts through a cache.

    import loader
    model = loader.from_pretrained("mixtral-2bit", ram_cache="6GiB")
    tokenizer = loader.load_tokenizer("mixtral-2bit")

After `import loader`, AutoModelForCausalLM of transformers loads converted folders too
(docs/load.md).

- *Folder*: an index, the trunk and expert files (docs/format.md); *trunk*: all weights but experts.
- *Expert cache*: the experts in memory; *slot*: room for one expert of a layer.
- *Backend*: computes products of packed weights. *Decoder*: computes one token natively.

Rooms, lower ones first; a room imports only lower ones:

- `lifetime`: forked children and copies of a model
- `budget`: bytes that experts may use, and the slots that these hold
- `experts`: the cache, its eviction policies, prefetch and reading threads
- `arithmetic`: products on the CPU; `native`: their C++ code
- `hf/modules`: modules over packed weights in place of transformers' own
- `decode`: one token on the CPU, and the protocol of decoders; `cuda`: the same on GPUs
- `hf`: the served class, its KV cache and its path for each token
- `hf/loading`: builds a model or tokenizer from a folder
- `hf/by_name`: makes transformers' Auto classes accept converted folders
- this folder: `model.py` loads, `repository.py` opens a folder or repository, `placement.py` sets
  up cache, backends and decoder, `default_options.py` and `option_values.py` hold the options
- `evaluation`, `serving`, `traces`, `planning`: uses of a loaded model

Invariants: cache size, policy, prefetch and check change speed, never a result. Importing `loader`
imports neither torch nor transformers.
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
"""Public name -> its module, imported at the first use: torch and transformers take seconds."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


# Passed as a function: by_name must not import the modules that use it.
register_with_transformers(lambda: __getattr__("from_pretrained"))
