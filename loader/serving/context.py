"""Length of a model's context and size of its KV cache, from index and config.json."""

from pathlib import Path

from formats import INDEX_NAME, PENDING_NAME
from formats.config.recorded_config import CONFIG_NAME, read_recorded_config
from formats.errors import RecipeError
from formats.index import read_index
from formats.model_memory import kv_position_bytes
from formats.safetensors_header import DTYPE_BYTES

DEFAULT_CONTEXT = 8192
"""Maximum context in tokens if --max-context is not given. The KV cache of a model's whole context
can be larger than its experts.
"""
_FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class ContextSize:
    """Context of the model in a converted folder.

    max_tokens: the model's maximum. position_bytes: size of one position in the KV cache.
    """

    def __init__(self, folder: Path, kv_bits: int = 16) -> None:
        """kv_bits: of `loader.from_pretrained`."""
        name = INDEX_NAME if (folder / INDEX_NAME).exists() else PENDING_NAME
        index = read_index(folder, name)
        config = (
            read_recorded_config(folder, index)[0]
            if (folder / CONFIG_NAME).exists()
            else index.config
        )
        architecture = index.architecture
        element_bytes = DTYPE_BYTES[_FLOATS.get(str(config.get("dtype")), "F32")]
        self.max_tokens = int(config.get("max_position_embeddings") or DEFAULT_CONTEXT)
        self.position_bytes = kv_position_bytes(architecture, element_bytes, kv_bits)

    def chosen(self, requested: int | None) -> int:
        """Return the context length in tokens. RecipeError if `requested` exceeds the maximum."""
        if requested is not None and requested > self.max_tokens:
            raise RecipeError(
                f"--max-context {requested}: the model's maximum is {self.max_tokens} tokens",
                f"--max-context {self.max_tokens}",
            )
        return min(self.max_tokens, DEFAULT_CONTEXT) if requested is None else requested
