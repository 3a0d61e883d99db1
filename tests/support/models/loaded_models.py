"""Models loaded from converted folders, and comparisons of their logits."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

import loader
from formats.artifact import Artifact
from formats.packing import packing_named
from formats.reading.direct_reader import DirectReader
from formats.tiles import dequantize, expert_weights, unpack
from loader.arithmetic import kernels
from loader.budget.expert_sizes import expert_bytes_by_layer, staging_bytes

BACKENDS = [
    "torch",
    pytest.param("native", marks=pytest.mark.skipif(not kernels.available(), reason="not built")),
]


def dequantized(folder):
    """A plain float32 Mixtral of the weights that `folder` stands for."""
    artifact = Artifact.open(folder)
    architecture = artifact.architecture
    config = MixtralConfig.from_dict(
        {k: v for k, v in artifact.config.items() if k != "quantization_config"}
    )
    config.dtype = torch.float32
    trunk = load_file(folder / artifact.index.trunk.file)
    state = {name: tensor.float() for name, tensor in trunk.items() if tensor.dtype != torch.uint8}
    for name, linear in artifact.index.trunk.packed.items():
        packing = packing_named(linear.packing)
        matrix = unpack(trunk[f"{name}.packed"], packing, linear.rows, linear.columns)
        state[f"{name}.weight"] = dequantize(matrix, packing.group_size)
    with DirectReader(artifact) as reader:
        for layer in range(architecture.num_hidden_layers):
            experts = [
                expert_weights(artifact.layout(layer, e), reader.read(layer, e))
                for e in range(architecture.num_local_experts)
            ]
            prefix = f"model.layers.{layer}.mlp.experts"
            state[f"{prefix}.gate_up_proj"] = torch.stack(
                [torch.cat([gate, up]) for gate, up, _ in experts]
            )
            state[f"{prefix}.down_proj"] = torch.stack([down for _, _, down in experts])
    if architecture.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = MixtralForCausalLM(config)
    model.load_state_dict(state, strict=True)
    return model.eval()


def load(folder, **options):
    return loader.from_pretrained(folder, **{"kernels": "torch", "dtype": torch.float32, **options})


def slots_budget(folder, slots):
    artifact = Artifact.open(folder)
    return slots * sum(expert_bytes_by_layer(artifact)) + staging_bytes(artifact, 2)


def apart(a, b):
    """The largest difference of two tensors of logits, relative to the spread of the second."""
    return ((a - b).abs().max() / b.std()).item()


@torch.inference_mode()
def logits(model, ids, **options):
    return model(input_ids=ids, **options).logits
