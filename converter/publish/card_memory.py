"""The sections of a model card on sizes and memory."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from converter.publish.card_markdown import block
from converter.publish.card_usage import FOLDER, Usage
from formats.artifact import Artifact
from formats.index import ExpertEntry, Index
from formats.model_memory import PROCESS_BYTES, activation_bytes, kv_position_bytes
from formats.safetensors_header import DTYPE_BYTES
from formats.sizes import format_size, size_option

CONTEXT = 4096
PROMPT = 512
"""Positions of the KV cache and tokens of the longest prompt: the defaults of `plan`."""
SHARES = (("all", 1.0), ("half", 0.5), ("a quarter", 0.25), ("as few as possible", 0.0))


@dataclass(frozen=True)
class Memory:
    """RAM of a process on the CPU in bytes, as `plan` computes it.

    fixed_bytes: all but experts, for CONTEXT positions and prompts of PROMPT tokens. experts_bytes:
    all experts. least_bytes: the smallest expert cache.
    """

    fixed_bytes: int
    experts_bytes: int
    least_bytes: int

    @classmethod
    def of(cls, artifact: Artifact) -> "Memory":
        """Return the memory of a converted folder."""
        a = artifact.architecture
        tensors = artifact.trunk_header().entries
        item_bytes = DTYPE_BYTES[tensors["model.embed_tokens.weight"].dtype]
        experts = range(a.num_local_experts)
        largest = [
            max(artifact.layout(layer, expert).n_bytes for expert in experts)
            for layer in range(a.expert_layers)
        ]
        return cls(
            fixed_bytes=sum(tensor.n_bytes for tensor in tensors.values())
            + CONTEXT * kv_position_bytes(a, item_bytes)
            + activation_bytes(a, PROMPT)
            + PROCESS_BYTES,
            experts_bytes=len(experts) * sum(largest),
            least_bytes=max(2, a.num_experts_per_tok) * sum(set(largest)),
        )

    def cache_bytes(self, share: float) -> int:
        """Return the size of an expert cache for a share of the experts."""
        return max(self.least_bytes, math.ceil(share * self.experts_bytes))


def memory_lines(artifact: Artifact, usage: Usage) -> Iterator[str]:
    """Yield the table of disk space and RAM, and the command that estimates the speed."""
    memory = Memory.of(artifact)
    yield f"The files take {format_size(artifact.index.weight_bytes)} on the disk."
    yield "The RAM depends on the share of the experts that you keep in it."
    yield "The others are read from the disk when a token needs them, which is slower."
    yield ""
    yield "| experts in RAM | RAM of the process | option |"
    yield "|---|---|---|"
    for name, share in SHARES:
        cache_bytes = memory.cache_bytes(share)
        ram = format_size(memory.fixed_bytes + cache_bytes)
        yield f"| {name} | {ram} | `--ram-cache {size_option(cache_bytes)}` |"
    yield ""
    yield f"This is for {CONTEXT} tokens of context and prompts of {PROMPT} tokens, on the CPU."
    yield "Without the option, moe-convert uses the RAM that is free."
    yield "In Python the option is `ram_cache`."
    yield "It changes the speed and never the text."
    yield ""
    downloaded = "" if usage.name == FOLDER else "After the download, "
    yield f"{downloaded}{'this' if downloaded else 'This'} estimates the speed on your machine:"
    yield ""
    yield from block("bash", usage.command("plan"))


def size_lines(index: Index) -> Iterator[str]:
    """Yield the table of sizes."""
    a = index.architecture
    parameters = model_parameters(index)
    entries = expert_entries(index)
    yield "| property | value |"
    yield "|---|---|"
    yield f"| model type | `{a.model_type}` |"
    yield f"| parameters | {parameters:,} (the Hub's viewer counts packed bytes) |"
    yield f"| bits per parameter, whole model | {8 * index.weight_bytes / parameters:.2f} |"
    yield f"| layers with experts | {a.expert_layers} |"
    yield f"| experts per layer | {a.num_local_experts}; a token uses {a.num_experts_per_tok} |"
    yield f"| one expert | {format_size(entries[0].length)} |"
    yield f"| all experts | {format_size(sum(entry.length for entry in entries))} |"
    yield f"| everything else | {format_size(index.trunk.size_bytes)} |"


def model_parameters(index: Index) -> int:
    """Return the number of the model's parameters; viewers of packed files count bytes."""
    a = index.architecture
    expert_parameters = 3 * a.hidden_size * a.intermediate_size
    return expert_parameters * a.num_local_experts * a.expert_layers + index.trunk.parameters


def expert_entries(index: Index) -> list[ExpertEntry]:
    """Return the entries of all experts, layer by layer."""
    return [entry for layer in index.layers for entry in layer.experts]
