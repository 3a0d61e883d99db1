"""Memory of a process against docs and `plan`, with a checkpoint whose experts exceed the limit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architectures import shape_of
from memory_groups import memory_group
from project_paths import ROOT, SUPPORT
from safetensors.torch import save_file

from converter.convert import convert_checkpoint
from converter.recipe.recipes import make_recipe
from formats.artifact import Artifact
from loader.planning.memory_plan import Machine, ModelSizes, plan_memory

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")

CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_act": "silu",
    "dtype": "bfloat16",
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_hidden_layers": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
PROMPT, TOKENS = 24, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A converted checkpoint of random weights: 47 MB of experts."""
    source = tmp_path_factory.mktemp("random")
    (source / "config.json").write_text(json.dumps(CONFIG))
    generator = torch.Generator().manual_seed(0)
    shapes = expert_shapes() | trunk_shapes()
    tensors = {
        name: torch.randn(shape, generator=generator).mul_(0.05).bfloat16()
        for name, shape in shapes.items()
    }
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    out = source.with_name(f"{source.name}-4bit")
    convert_checkpoint(source, out, make_recipe("4bit", solver="hqq"))
    return out


def expert_shapes():
    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    return {
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight": shape
        for layer in range(CONFIG["num_hidden_layers"])
        for expert in range(CONFIG["num_local_experts"])
        for name, shape in (
            ("w1", (inner, hidden)),
            ("w2", (hidden, inner)),
            ("w3", (inner, hidden)),
        )
    }


def trunk_shapes():
    trunk = shape_of(CONFIG).trunk
    return {
        name.replace("mlp.gate", "block_sparse_moe.gate"): shape for name, shape in trunk.items()
    }


@pytest.fixture(scope="module")
def plan(folder):
    """The plan of a process whose cache holds a quarter of the experts."""
    sizes = ModelSizes.of_folder(Artifact.open(folder))
    ram = sizes.fixed(PROMPT + TOKENS, PROMPT) + sizes.all_experts // 4
    return plan_memory(sizes, Machine(1, 1), ram, context=PROMPT + TOKENS, prompt=PROMPT)


def run(folder, options, enter=None):
    script = SUPPORT / "experts" / "memory_run.py"
    command = [
        sys.executable,
        str(script),
        str(folder),
        json.dumps(options),
        str(PROMPT),
        str(TOKENS),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=enter, env=environment, check=False
    )
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-2000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def test_anonymous_memory_stays_within_the_plan(folder, plan):
    found = run(folder, {"ram_cache": plan.cache_bytes})
    assert tuple(found["slots"]) == plan.slots
    assert found["bytes_read"] > 2 * plan.cache_bytes
    assert found["most"] < plan.ram_bytes


@pytest.mark.slow
def test_a_process_limited_to_its_plan_is_not_killed_and_gives_the_same_tokens(folder, plan):
    with memory_group(plan.ram_bytes) as enter:
        if enter is None:
            pytest.skip("no memory control groups for this user")
        limited = run(folder, {"ram_cache": plan.cache_bytes}, enter)
    assert limited["ids"] == run(folder, {})["ids"]


def test_the_same_limit_kills_a_process_whose_cache_is_larger(folder, plan):
    with memory_group(plan.ram_bytes) as enter:
        if enter is None:
            pytest.skip("no memory control groups for this user")
        with pytest.raises(AssertionError, match="exit code -9"):
            run(folder, {"ram_cache": "1GiB", "io": "direct"}, enter)
