"""What fits where within a budget, and the tokens per second to expect: numbers of index and
headers only.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from formats.artifact import Artifact
from formats.errors import DoesNotFitError
from formats.index import Architecture
from formats.safetensors_header import DTYPE_BYTES, TensorEntry
from loader.budget.expert_sizes import (
    SizedExperts,
    expert_bytes_by_layer,
    staging_bytes,
    staging_experts,
)
from loader.budget.slot_counts import can_lie_in_place, slots_by_layer
from loader.experts.policy import Policy
from loader.traces.slot_shares import miss_bytes
from loader.traces.trace import Trace

PROCESS_BYTES = 320 << 20
"""Python, torch and transformers, and what one token's forward pass takes beside weights, cache and
keys. Measured: 302 MiB of anonymous memory after a prompt of 16 tokens and 16 more (torch 2.13 on
CPU, transformers 5.24).
"""

EFFICIENCY = 0.75
"""The low end of the expected speed, as a share of what disk and memory allow where nothing
overlaps. Measured over four 8x7B-shaped layers at 2 bits on two cores: 0.8 with all experts in
memory, 0.98 to 1.1 with fewer.
"""


@dataclass(frozen=True)
class ModelSizes:
    """What one token reads and keeps, in bytes.

    experts: their sizes in memory. stored: of an expert of each layer in its file, on the mean.
    trunk: everything in memory that is not an expert. trunk_read: what of it a token reads
    (embeddings give one row). kv_per_position: keys and values of all layers. in_place: whether
    experts in memory can be used where the file is mapped. prefix: what prefix caches of a server
    may take.
    """

    experts: SizedExperts
    stored: tuple[float, ...]
    trunk: int
    trunk_read: int
    kv_per_position: int
    in_place: bool
    prefix: int = 0

    @classmethod
    def of_folder(cls, artifact: Artifact) -> "ModelSizes":
        """Of a converted folder."""
        layers = artifact.index.layers
        stored = tuple(
            sum(entry.length for entry in layer.experts) / len(layer.experts) for layer in layers
        )
        return cls.of_parts(
            artifact, artifact.trunk_header().entries.values(), stored, can_lie_in_place(artifact)
        )

    @classmethod
    def of_parts(
        cls,
        experts: SizedExperts,
        trunk: Iterable[TensorEntry],
        stored: tuple[float, ...] | None = None,
        in_place: bool = True,
    ) -> "ModelSizes":
        """Of a trunk's tensors; `stored` is as in memory if not given."""
        a = experts.architecture
        tensors = {entry.name: entry for entry in trunk}
        whole = sum(entry.n_bytes for entry in tensors.values())
        embeddings = tensors["model.embed_tokens.weight"]
        return cls(
            experts=experts,
            stored=stored or tuple(map(float, expert_bytes_by_layer(experts))),
            trunk=whole,
            trunk_read=whole if a.tie_word_embeddings else whole - embeddings.n_bytes,
            kv_per_position=2
            * a.num_hidden_layers
            * a.num_key_value_heads
            * a.head_dim
            * DTYPE_BYTES[embeddings.dtype],
            in_place=in_place,
        )

    @property
    def architecture(self) -> Architecture:
        """The model's numbers."""
        return self.experts.architecture

    @property
    def all_experts(self) -> int:
        """Bytes of all experts in memory."""
        return self.architecture.num_local_experts * sum(expert_bytes_by_layer(self.experts))

    def activations(self, prompt: int) -> int:
        """Those of an expert and of attention in float32, for a prompt of so many tokens."""
        return (
            4
            * prompt
            * (2 * self.architecture.intermediate_size + 4 * self.architecture.hidden_size)
        )

    def workspace(self, prompt: int) -> int:
        """What the process takes beside weights, cache and keys for a prompt of so many tokens."""
        return PROCESS_BYTES + self.activations(prompt)

    def fixed(self, context: int, prompt: int) -> int:
        """What the process takes beside experts."""
        return self.trunk + self.kv_per_position * context + self.prefix + self.workspace(prompt)

    def used_per_token(self, context: int) -> int:
        """Bytes of weights, keys and values that computing one token reads, at the end of the
        context.
        """
        chosen = self.architecture.num_experts_per_tok
        return (
            self.trunk_read
            + chosen * sum(expert_bytes_by_layer(self.experts))
            + self.kv_per_position * context
        )

    @property
    def staging_bytes(self) -> int:
        """Bytes of experts on their way: the least that a cache takes."""
        return staging_bytes(self.experts, staging_experts(self.architecture))


@dataclass(frozen=True)
class Machine:
    """Bytes a second of this machine's memory, and of where missed experts come from."""

    memory_bytes_per_s: float
    disk_bytes_per_s: float


@dataclass(frozen=True)
class Plan:
    """What takes how many bytes, and what to expect.

    ram_bytes: the budget. kv_bytes: of one context; prefix_bytes: of a server's prefix caches.
    cache_bytes: what of the budget experts get (`ram_cache` of `from_pretrained`). aside_bytes: of
    experts on their way, slot_bytes: of those in slots, together at most cache_bytes. slots: of
    each layer. miss_ratio: of the experts that a token needs.
    read_bytes_per_token: from the disk. tokens_per_s: (low, high) of one sequence at the end of the
    context: without overlap of reading and computing, at EFFICIENCY, and with perfect overlap.
    """

    ram_bytes: int
    trunk_bytes: int
    kv_bytes: int
    prefix_bytes: int
    workspace_bytes: int
    cache_bytes: int
    aside_bytes: int
    slot_bytes: int
    slots: tuple[int, ...]
    miss_ratio: float
    read_bytes_per_token: float
    tokens_per_s: tuple[float, float]


MissRatios = Sequence[Mapping[int, float]]
"""For each layer: slots -> the share of the needed experts that are not there."""


def plan_memory(
    sizes: ModelSizes,
    machine: Machine,
    ram_bytes: int,
    *,
    context: int,
    prompt: int,
    miss_ratios: MissRatios | None = None,
) -> Plan:
    """The plan for a process of `ram_bytes`, a context of `context` positions of which `prompt`
    come at once.

    miss_ratios: of a trace (`traced_miss_ratios`); None assumes that every expert is equally
    likely. DoesNotFitError with the least budget if not even trunk, KV cache, workspace and one
    token's experts fit.
    """
    architecture, fixed = sizes.architecture, sizes.fixed(context, prompt)
    cache_bytes = ram_bytes - fixed
    if cache_bytes < sizes.staging_bytes:
        raise DoesNotFitError(
            f"{ram_bytes} bytes: the trunk takes {sizes.trunk}, {context} positions of KV cache"
            f" {sizes.kv_per_position * context}, prefix caches {sizes.prefix},"
            f" the process {sizes.workspace(prompt)}, experts on their way"
            f" {sizes.staging_bytes}: {fixed + sizes.staging_bytes} in all",
            f"give at least {math.ceil((fixed + sizes.staging_bytes) / 2**20)}MiB, or a shorter context or prompt, or convert"
            " to fewer bits",
        )
    slots = slots_by_layer(
        cache_bytes, sizes.experts, staging_experts(architecture), all_in_place=sizes.in_place
    )
    ratios = uniform_miss_ratios(architecture) if miss_ratios is None else miss_ratios
    missed = [
        layer[n] * architecture.num_experts_per_tok for layer, n in zip(ratios, slots, strict=True)
    ]
    read = sum(count * size for count, size in zip(missed, sizes.stored, strict=True))
    in_memory = expert_bytes_by_layer(sizes.experts)
    disk_s = read / machine.disk_bytes_per_s
    memory_s = sizes.used_per_token(context) / machine.memory_bytes_per_s
    return Plan(
        ram_bytes=ram_bytes,
        trunk_bytes=sizes.trunk,
        kv_bytes=sizes.kv_per_position * context,
        prefix_bytes=sizes.prefix,
        workspace_bytes=sizes.workspace(prompt),
        cache_bytes=cache_bytes,
        aside_bytes=0
        if sizes.in_place and cache_bytes >= sizes.all_experts
        else sizes.staging_bytes,
        slot_bytes=sum(n * size for n, size in zip(slots, in_memory, strict=True)),
        slots=slots,
        miss_ratio=sum(missed) / (architecture.num_experts_per_tok * len(slots)),
        read_bytes_per_token=read,
        tokens_per_s=(EFFICIENCY / (disk_s + memory_s), 1 / max(disk_s, memory_s)),
    )


def plan_shares(
    sizes: ModelSizes,
    machine: Machine,
    shares: Sequence[float],
    *,
    context: int,
    prompt: int,
    miss_ratios: MissRatios | None = None,
) -> list[Plan]:
    """Plans for the least budget that works, and for those where experts get each of `shares` of
    what all take.
    """
    caches = [sizes.staging_bytes, *(math.ceil(share * sizes.all_experts) for share in shares)]
    fixed = sizes.fixed(context, prompt)
    return [
        plan_memory(
            sizes, machine, fixed + cache, context=context, prompt=prompt, miss_ratios=miss_ratios
        )
        for cache in sorted({max(cache, sizes.staging_bytes) for cache in caches})
    ]


def uniform_miss_ratios(architecture: Architecture) -> MissRatios:
    """Where each expert is equally likely at each token: 1 - slots / experts, for any policy that
    does not know the future.
    """
    count = architecture.num_local_experts
    return [{slots: 1 - slots / count for slots in range(count + 1)}] * architecture.expert_layers


def traced_miss_ratios(trace: Trace, policy: Callable[[], Policy]) -> MissRatios:
    """Of the decoded tokens of `trace`."""
    decoded = sum(s.tokens - s.prompt_tokens for s in trace.header.sequences)
    layers = miss_bytes(trace, [policy] * trace.experts.shape[1])
    return [
        {
            slots: n_bytes / max(1, decoded * trace.experts.shape[2] * size)
            for slots, n_bytes in layer.items()
        }
        for layer, size in zip(layers, trace.header.expert_bytes, strict=True)
    ]
