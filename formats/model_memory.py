"""Memory of a process that runs a model, without the cached experts, in bytes."""

from formats.index import Architecture

PROCESS_BYTES = 320 << 20
"""RAM for Python, torch, transformers and one token's activations. Measured: 302 MiB of anonymous
memory after a prompt of 16 tokens and 16 more (torch 2.13 on CPU, transformers 5.24).
"""


def kv_position_bytes(architecture: Architecture, item_bytes: int) -> int:
    """Return the bytes of one position of the KV cache, all layers.

    item_bytes: size of a key's or value's number, 2 for bf16.
    """
    heads = architecture.num_key_value_heads * architecture.head_dim
    return 2 * architecture.num_hidden_layers * heads * item_bytes


def activation_bytes(architecture: Architecture, prompt: int) -> int:
    """Return the bytes of activations for a prompt of `prompt` tokens, float32."""
    return 4 * prompt * (2 * architecture.intermediate_size + 4 * architecture.hidden_size)
