"""What fits where within a budget, and the tokens per second to expect: numbers of the index only, nothing is read."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from formats.errors import DoesNotFitError
from formats.index import Index
from loader.policy import Policy
from loader.slot_shares import miss_bytes
from loader.trace import Trace

WORKSPACE_BYTES = 256 << 20
"""For activations, staging and what Python and torch take beyond the weights, where nothing better is known."""


@dataclass(frozen=True)
class ModelSizes:
    """What one token reads and keeps, in bytes.

    trunk: everything in memory that is not an expert. trunk_read: what of it a token reads (embeddings give one row).
    experts: the largest expert of each layer. kv_per_position: keys and values of all layers. chosen, count: experts a
    token and layer, and a layer.
    """

    trunk: int
    trunk_read: int
    experts: tuple[int, ...]
    kv_per_position: int
    chosen: int
    count: int

    @classmethod
    def of_index(cls, index: Index, *, activation_bytes: int = 2) -> "ModelSizes":
        """From a converted folder's index; `activation_bytes` is the size of one embedding's or key's number."""
        a = index.architecture
        embeddings = 0 if a.tie_word_embeddings else a.vocab_size * a.hidden_size * activation_bytes
        return cls(
            trunk=index.trunk.size_bytes,
            trunk_read=max(0, index.trunk.size_bytes - embeddings),
            experts=tuple(max(expert.length for expert in layer.experts) for layer in index.layers),
            kv_per_position=2 * a.num_hidden_layers * a.num_key_value_heads * a.head_dim * activation_bytes,
            chosen=a.num_experts_per_tok,
            count=a.num_local_experts,
        )


@dataclass(frozen=True)
class Machine:
    """Bytes a second of one processor's memory, and of where missed experts come from."""

    memory_bytes_per_s: float
    disk_bytes_per_s: float


@dataclass(frozen=True)
class Plan:
    """What takes how many bytes, and what to expect.

    slots: experts of each layer in memory; expert_bytes: all of them. miss_ratio: of the experts that a token needs.
    read_bytes_per_token: from the disk. tokens_per_s: (low, high) without and with perfect overlap of reading and
    computing, one sequence, at the end of the context.
    """

    trunk_bytes: int
    kv_bytes: int
    workspace_bytes: int
    expert_bytes: int
    slots: tuple[int, ...]
    miss_ratio: float
    read_bytes_per_token: float
    tokens_per_s: tuple[float, float]

    @property
    def total_bytes(self) -> int:
        """The memory that the process takes."""
        return self.trunk_bytes + self.kv_bytes + self.workspace_bytes + self.expert_bytes


def plan_memory(
    sizes: ModelSizes,
    machine: Machine,
    ram_bytes: int,
    *,
    context: int,
    miss_ratios: Mapping[int, float] | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Plan:
    """The plan for `ram_bytes`, a context of `context` positions, and equal slots in each layer.

    miss_ratios: slots -> share of misses, of a trace (`traced_miss_ratios`); None assumes that every expert is equally
    likely. DoesNotFitError with the least budget if trunk, KV cache, workspace and one token's experts do not fit.
    """
    fixed = sizes.trunk + sizes.kv_per_position * context + workspace_bytes
    slot_bytes = sum(sizes.experts)
    slots = min(sizes.count, (ram_bytes - fixed) // slot_bytes)
    if slots < sizes.chosen:
        least = fixed + sizes.chosen * slot_bytes
        raise DoesNotFitError(
            f"{ram_bytes} bytes: the trunk, {context} positions of KV cache and {sizes.chosen} experts in each layer"
            f" take {least}",
            f"give at least {math.ceil(least / 2**20)}MiB, or a shorter context, or convert to fewer bits",
        )
    ratio = (uniform_miss_ratios(sizes) if miss_ratios is None else miss_ratios)[slots]
    chosen_bytes = sizes.chosen * slot_bytes
    read = ratio * chosen_bytes
    disk_s = read / machine.disk_bytes_per_s
    memory_s = (sizes.trunk_read + chosen_bytes + sizes.kv_per_position * context) / machine.memory_bytes_per_s
    return Plan(
        trunk_bytes=sizes.trunk,
        kv_bytes=sizes.kv_per_position * context,
        workspace_bytes=workspace_bytes,
        expert_bytes=slots * slot_bytes,
        slots=(slots,) * len(sizes.experts),
        miss_ratio=ratio,
        read_bytes_per_token=read,
        tokens_per_s=(1 / (disk_s + memory_s), 1 / max(disk_s, memory_s)),
    )


def uniform_miss_ratios(sizes: ModelSizes) -> dict[int, float]:
    """Slots -> share of misses where each expert is equally likely at each token: 1 - slots / experts, for any policy
    that does not know the future."""
    return {slots: 1 - slots / sizes.count for slots in range(sizes.chosen, sizes.count + 1)}


def traced_miss_ratios(trace: Trace, policies: Sequence[Callable[[], Policy]]) -> dict[int, float]:
    """Slots a layer -> share of the decoded tokens' expert bytes that missed in `trace`; `policies`: one a layer."""
    decoded = sum(s.tokens - s.prompt_tokens for s in trace.header.sequences)
    needed = decoded * trace.experts.shape[2] * sum(trace.header.expert_bytes)
    layers = miss_bytes(trace, policies)
    return {slots: sum(layer[slots] for layer in layers) / needed for slots in layers[0]}
