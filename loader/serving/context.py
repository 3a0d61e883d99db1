"""How many tokens a context has, and what its KV cache takes, from a folder's index and
config.json.
"""

from pathlib import Path

from formats import INDEX_NAME, PENDING_NAME
from formats.config.recorded_config import CONFIG_NAME, read_recorded_config
from formats.errors import RecipeError
from formats.index import read_index
from formats.safetensors_header import DTYPE_BYTES

DEFAULT_CONTEXT = 8192
"""Tokens at most where nobody says how many: the KV cache of a model's whole context may take more
than its experts.
"""
_FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class ContextSize:
    """Of the model in a folder that has an index and config.json."""

    def __init__(self, folder: Path) -> None:
        name = INDEX_NAME if (folder / INDEX_NAME).exists() else PENDING_NAME
        index = read_index(folder, name)
        config = (
            read_recorded_config(folder, index)[0]
            if (folder / CONFIG_NAME).exists()
            else index.config
        )
        architecture = index.architecture
        element_bytes = DTYPE_BYTES[_FLOATS.get(str(config.get("dtype")), "F32")]
        heads = architecture.num_key_value_heads * architecture.head_dim
        self.most = int(config.get("max_position_embeddings") or DEFAULT_CONTEXT)
        self.position_bytes = 2 * architecture.num_hidden_layers * heads * element_bytes

    def chosen(self, wish: int | None) -> int:
        """Return the tokens of a context. RecipeError where the model has fewer than `wish`."""
        if wish is not None and wish > self.most:
            raise RecipeError(
                f"--max-context {wish}: the model was made for {self.most} tokens", "give fewer"
            )
        return min(self.most, DEFAULT_CONTEXT) if wish is None else wish
