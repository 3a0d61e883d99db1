"""The model's sizes and constants as GGUF metadata of the architecture llama."""

from typing import Any

from gguf import GGUFWriter, RopeScalingType

from converter.gguf import RUN_HINT
from formats.artifact import Artifact
from formats.errors import MoeConvertError

MODEL_TYPES = ("mixtral",)
"""Model types that can be exported. llama.cpp reads Mixtral as `llama` with experts."""

_ROPE_TYPES = ("default", "linear")


def check_model(artifact: Artifact) -> None:
    """Raise MoeConvertError for a model that cannot be exported, with the field's name."""
    model_type = artifact.architecture.model_type
    if model_type not in MODEL_TYPES:
        raise _refusal(artifact, f"model type {model_type}", MODEL_TYPES)
    rope = artifact.config["rope_parameters"]["rope_type"]
    if rope not in _ROPE_TYPES:
        raise _refusal(artifact, f"rope_type {rope!r}", _ROPE_TYPES)


def _refusal(artifact: Artifact, field: str, known: tuple[str, ...]) -> MoeConvertError:
    return MoeConvertError(
        f"{artifact.folder}: {field} cannot be exported to GGUF yet; known: {', '.join(known)}",
        RUN_HINT,
    )


def context_length(config: dict[str, Any]) -> int:
    """Return the number of positions for which llama.cpp computes what the model does.

    llama.cpp has no sliding window for this architecture: up to the window's length it has no
    effect.
    """
    positions: int = config["max_position_embeddings"]
    window: int | None = config.get("sliding_window")
    return min(positions, window) if window else positions


def add_hyperparameters(writer: GGUFWriter, artifact: Artifact) -> None:
    """Add the fields from which llama.cpp builds the model."""
    a = artifact.architecture
    config = artifact.config
    rope = config["rope_parameters"]
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(a.hidden_size)
    writer.add_block_count(a.num_hidden_layers)
    writer.add_feed_forward_length(a.intermediate_size)
    writer.add_head_count(a.num_attention_heads)
    writer.add_head_count_kv(a.num_key_value_heads)
    writer.add_key_length(a.head_dim)
    writer.add_value_length(a.head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(a.num_local_experts)
    writer.add_expert_used_count(a.num_experts_per_tok)
    writer.add_vocab_size(a.vocab_size)
    writer.add_rope_dimension_count(a.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
