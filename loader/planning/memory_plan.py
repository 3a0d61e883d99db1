"""Plans on the CPU: what fits within a RAM budget, and the expected tokens per second."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from formats.artifact import Artifact
from formats.errors import DoesNotFitError
from formats.index import Architecture
from formats.model_memory import PROCESS_BYTES, activation_bytes, kv_position_bytes
from formats.safetensors_header import DTYPE_BYTES, TensorEntry
from formats.sizes import size_option
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

EFFICIENCY = 0.75
"""Low end of the expected speed, as a share of the speed that disk and memory allow without
overlap. Measured with four 8x7B-shaped layers at 2 bits on two cores: 0.8 with all experts in
memory, 0.98 to 1.1 with fewer.
"""


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model, in bytes.

    experts: gives their sizes in memory. stored: mean size of a stored expert, of each layer.
    trunk: all weights that are not experts. trunk_read: part of the trunk that one token reads,
    without the embeddings, of which it reads one row. kv_per_position: keys and values of all
    layers. in_place: True if experts can be used where files are mapped. prefix: budget of a
    server's prefix caches. kv_copy_per_position: dequantized keys and values of one layer, which
    a prompt's attention reads if the KV cache has 8 bits.
    """

    experts: SizedExperts
    stored: tuple[float, ...]
    trunk: int
    trunk_read: int
    kv_per_position: int
    in_place: bool
    prefix: int = 0
    kv_copy_per_position: int = 0

    @classmethod
    def of_folder(cls, artifact: Artifact, kv_bits: int = 16) -> "ModelSizes":
        """Return the sizes of a converted folder. kv_bits: 8 or 16, of the KV cache."""
        layers = artifact.index.layers
        stored = tuple(
            sum(entry.length for entry in layer.experts) / len(layer.experts) for layer in layers
        )
        return cls.of_parts(
            artifact,
            artifact.trunk_header().entries.values(),
            stored,
            can_lie_in_place(artifact),
            kv_bits,
        )

    @classmethod
    def of_parts(
        cls,
        experts: SizedExperts,
        trunk: Iterable[TensorEntry],
        stored: tuple[float, ...] | None = None,
        in_place: bool = True,
        kv_bits: int = 16,
    ) -> "ModelSizes":
        """Return the sizes of experts and a trunk's tensors.

        stored: None if stored experts have the size of those in memory.
        """
        a = experts.architecture
        tensors = {entry.name: entry for entry in trunk}
        item_bytes = DTYPE_BYTES[tensors["model.embed_tokens.weight"].dtype]
        whole = sum(entry.n_bytes for entry in tensors.values())
        embeddings = tensors["model.embed_tokens.weight"]
        return cls(
            experts=experts,
            stored=stored or tuple(map(float, expert_bytes_by_layer(experts))),
            trunk=whole,
            trunk_read=whole if a.tie_word_embeddings else whole - embeddings.n_bytes,
            kv_per_position=kv_position_bytes(a, item_bytes, kv_bits),
            in_place=in_place,
            kv_copy_per_position=kv_position_bytes(a, item_bytes) // a.num_hidden_layers
            if kv_bits == 8
            else 0,
        )

    @property
    def architecture(self) -> Architecture:
        """The model's dimensions."""
        return self.experts.architecture

    @property
    def all_experts(self) -> int:
        """Bytes of all experts in memory."""
        return self.architecture.num_local_experts * sum(expert_bytes_by_layer(self.experts))

    def activations(self, prompt: int) -> int:
        """Return the bytes of activations for a prompt of `prompt` tokens, float32."""
        return activation_bytes(self.architecture, prompt)

    def workspace(self, context: int, prompt: int) -> int:
        """Return the bytes of the process without weights, expert cache and KV cache."""
        return PROCESS_BYTES + self.activations(prompt) + self.kv_copy_per_position * context

    def fixed(self, context: int, prompt: int) -> int:
        """Return the bytes of the process without experts."""
        kv = self.kv_per_position * context
        return self.trunk + kv + self.prefix + self.workspace(context, prompt)

    def used_per_token(self, context: int) -> int:
        """Return the bytes of weights, keys and values that a token reads at the context's end."""
        chosen = self.architecture.num_experts_per_tok
        return (
            self.trunk_read
            + chosen * sum(expert_bytes_by_layer(self.experts))
            + self.kv_per_position * context
        )

    @property
    def staging_bytes(self) -> int:
        """Bytes of the staging area: the smallest possible expert cache."""
        return staging_bytes(self.experts, staging_experts(self.architecture))


@dataclass(frozen=True)
class Machine:
    """Speeds in bytes per second: reads of memory, and reads of missed experts from disk."""

    memory_bytes_per_s: float
    disk_bytes_per_s: float


@dataclass(frozen=True)
class Plan:
    """Use of a RAM budget in bytes, and the expected speed.

    ram_bytes: the budget. kv_bytes: KV cache of one context. prefix_bytes: prefix caches of a
    server. cache_bytes: for experts (`ram_cache` of `from_pretrained`); it holds aside_bytes, the
    staging area, and slot_bytes. slots: of each layer. miss_ratio: share of the requested experts
    that are not in memory. read_bytes_per_token: from disk.
    tokens_per_s: (low, high) for one sequence at the end of the context; low without overlap of
    reads and computing, times EFFICIENCY; high with perfect overlap.
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
"""For each layer: slots -> share of the requested experts that miss."""


def plan_memory(
    sizes: ModelSizes,
    machine: Machine,
    ram_bytes: int,
    *,
    context: int,
    prompt: int,
    miss_ratios: MissRatios | None = None,
) -> Plan:
    """Return the plan for a process of `ram_bytes`.

    context: positions of the KV cache, of which `prompt` come at once. miss_ratios: from a trace
    (`traced_miss_ratios`); None assumes that all experts are equally likely.

    Raises DoesNotFitError with the smallest budget if trunk, KV cache, workspace and one token's
    experts do not fit.
    """
    architecture, fixed = sizes.architecture, sizes.fixed(context, prompt)
    cache_bytes = ram_bytes - fixed
    if cache_bytes < sizes.staging_bytes:
        raise DoesNotFitError(
            f"{ram_bytes} bytes: the trunk takes {sizes.trunk}, {context} positions of KV cache"
            f" {sizes.kv_per_position * context}, prefix caches {sizes.prefix},"
            f" the process {sizes.workspace(context, prompt)}, experts on their way"
            f" {sizes.staging_bytes}: {fixed + sizes.staging_bytes} in all",
            f"give at least {size_option(fixed + sizes.staging_bytes)},"
            " or a shorter context or prompt, or convert to fewer bits",
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
        workspace_bytes=sizes.workspace(context, prompt),
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
    """Return plans for the smallest budget, and for caches with each of `shares` of the experts."""
    caches = [sizes.staging_bytes, *(math.ceil(share * sizes.all_experts) for share in shares)]
    fixed = sizes.fixed(context, prompt)
    return [
        plan_memory(
            sizes, machine, fixed + cache, context=context, prompt=prompt, miss_ratios=miss_ratios
        )
        for cache in sorted({max(cache, sizes.staging_bytes) for cache in caches})
    ]


def uniform_miss_ratios(architecture: Architecture) -> MissRatios:
    """Return the miss ratios if all experts are equally likely: 1 - slots / experts.

    They hold for every policy that does not know future requests.
    """
    count = architecture.num_local_experts
    return [{slots: 1 - slots / count for slots in range(count + 1)}] * architecture.expert_layers


def traced_miss_ratios(trace: Trace, policy: Callable[[], Policy]) -> MissRatios:
    """Return the miss ratios of a trace's decoded tokens."""
    decoded = sum(s.tokens - s.prompt_tokens for s in trace.header.sequences)
    layers = miss_bytes(trace, [policy] * trace.experts.shape[1])
    return [
        {
            slots: n_bytes / max(1, decoded * trace.experts.shape[2] * size)
            for slots, n_bytes in layer.items()
        }
        for layer, size in zip(layers, trace.header.expert_bytes, strict=True)
    ]
