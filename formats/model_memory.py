"""Memory of a process that runs a model, without the cached experts, in bytes."""

from formats.index import Architecture

PROCESS_BYTES = 320 << 20
"""RAM for Python, torch, transformers and one token's activations. Measured: 302 MiB of anonymous
memory after a prompt of 16 tokens and 16 more (torch 2.13 on CPU, transformers 5.24).
"""


KV_GROUP = 64
"""Values of a head that share a bfloat16 scale in a KV cache of 8 bits."""


def kv_position_bytes(architecture: Architecture, item_bytes: int, kv_bits: int = 16) -> int:
    """Return the bytes of one position of the KV cache, all layers.

    item_bytes: size of a key's or value's number, 2 for bf16. kv_bits: 8 for int8 with scales,
    whatever `item_bytes` is.
    """
    width = architecture.head_dim
    head_bytes = width * item_bytes if kv_bits == 16 else width + 2 * -(-width // KV_GROUP)
    return 2 * architecture.num_hidden_layers * architecture.num_key_value_heads * head_bytes


def activation_bytes(architecture: Architecture, prompt: int) -> int:
    """Return the bytes of activations for a prompt of `prompt` tokens, float32."""
    return 4 * prompt * (2 * architecture.intermediate_size + 4 * architecture.hidden_size)
