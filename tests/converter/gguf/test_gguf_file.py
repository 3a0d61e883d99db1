"""Exported files hold the folder's weights, and appear only when they are complete."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damaged_files import flip
from exported_models import (
    SIZES,
    convert_wide,
    export_folder,
    fields_of,
    largest_difference,
    tensors_of,
    write_wide_source,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import apply_rotary_pos_emb

import loader
from converter.gguf.block_types import Type, type_named
from converter.gguf.encode import CHUNK_WEIGHTS
from converter.gguf.gguf_file import plan_export, write_gguf
from converter.gguf.options import ExportOptions
from formats.artifact import Artifact
from formats.errors import DamageError, DoesNotFitError, MoeConvertError, RecipeError
from formats.packing import PACKINGS
from formats.reading.mmap_reader import MmapReader
from formats.tiles import expert_weights, matrix_weights

Wide = Callable[..., Path]
MATRICES = ("gate", "up", "down")


def check_experts(folder: Path, file: Path, expected: list[str]) -> None:
    """Compare all experts with the folder's. expected: type of each layer's gate_up and down."""
    artifact = Artifact.open(folder)
    tensors = tensors_of(file)
    kinds = []
    with MmapReader(artifact) as reader:
        for layer in range(artifact.architecture.expert_layers):
            stacked = [tensors[f"blk.{layer}.ffn_{name}_exps.weight"] for name in MATRICES]
            kinds += [stacked[0][0], stacked[2][0]]
            assert stacked[0][0] == stacked[1][0]
            for expert in range(artifact.architecture.num_local_experts):
                weights = expert_weights(artifact.layout(layer, expert), reader.read(layer, expert))
                for (_, read), matrix in zip(stacked, weights, strict=True):
                    assert largest_difference(read[expert], matrix) == 0.0
    assert kinds == expected


@pytest.mark.parametrize(
    ("recipe", "options", "expected"),
    [
        ("2bit", {}, ["Q2_K"] * 4),
        ("3bit", {}, ["Q4_K"] * 4),
        ("2bit-down3", {}, ["Q2_K", "Q4_K"] * 2),
        ("16bit", {}, ["BF16"] * 4),
        ("2bit", {"rules": ("1/gate_up=3bit", "1/down=16bit")}, ["Q2_K", "Q2_K", "Q4_K", "BF16"]),
    ],
)
def test_experts_have_the_folders_weights(
    wide: Wide, tmp_path: Path, recipe: str, options: Any, expected: list[str]
) -> None:
    folder = wide(recipe, **options)
    check_experts(folder, export_folder(folder, tmp_path / "m.gguf"), expected)


@pytest.mark.parametrize("recipe", ["4bit", "paper-2bit", "paper-3bit"])
def test_float32_holds_every_recipe_exactly(wide: Wide, tmp_path: Path, recipe: str) -> None:
    file = export_folder(wide(recipe), tmp_path / "m.gguf", experts=Type.F32)
    check_experts(wide(recipe), file, ["F32"] * 4)


def test_trunk_has_the_folders_weights(wide: Wide, tmp_path: Path) -> None:
    folder = wide("2bit")
    stored = load_file(folder / "trunk.safetensors")
    tensors = tensors_of(export_folder(folder, tmp_path / "m.gguf", attention=Type.F32))
    plain = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
        "blk.1.attn_norm": "model.layers.1.input_layernorm",
        "blk.1.ffn_norm": "model.layers.1.post_attention_layernorm",
        "blk.1.ffn_gate_inp": "model.layers.1.mlp.gate",
    }
    for name, module in plain.items():
        expected = stored[f"{module}.weight"].float()
        assert largest_difference(tensors[f"{name}.weight"][1], expected) == 0.0
    for name, module in (("v", "v_proj"), ("output", "o_proj")):
        read = tensors[f"blk.1.attn_{name}.weight"][1]
        packed = stored[f"model.layers.1.self_attn.{module}.packed"]
        expected = matrix_weights(PACKINGS["tile32-q4-g64-s8"], packed, *read.shape)
        assert largest_difference(read, expected) == 0.0
    assert {name.split(".")[2] for name in tensors if name.startswith("blk.1.")} == {
        *("attn_q", "attn_k", "attn_v", "attn_output", "attn_norm", "ffn_norm", "ffn_gate_inp"),
        *("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"),
    }


def rotate_neighbours(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotate dimensions 2i and 2i + 1 together, as llama.cpp does. x: [tokens, heads, size]."""
    size = x.shape[-1]
    angles = positions[:, None] * theta ** (-torch.arange(0, size, 2) / size)
    sin, cos = angles.sin()[:, None], angles.cos()[:, None]
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


@pytest.mark.parametrize("attention", [None, Type.Q8_0])
def test_scores_of_q_and_k_are_those_of_transformers(
    wide: Wide, wide_source: Path, tmp_path: Path, attention: Type | None
) -> None:
    folder = wide("16bit")
    model = AutoModelForCausalLM.from_pretrained(wide_source, dtype=torch.float32)
    model.requires_grad_(False)
    tensors = tensors_of(export_folder(folder, tmp_path / "m.gguf", attention=attention))
    positions = torch.tensor([0, 3, 50, 200])
    x = torch.randn(4, SIZES["hidden_size"], generator=torch.Generator().manual_seed(0))
    cos, sin = model.model.rotary_emb(x[None], positions[None])
    attn = model.model.layers[0].self_attn
    q = (x @ attn.q_proj.weight.T).view(1, 4, 8, 32).transpose(1, 2)
    k = (x @ attn.k_proj.weight.T).view(1, 4, 2, 32).transpose(1, 2)
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    expected = torch.einsum("hqd,hkd->hqk", q[0], k[0].repeat_interleave(4, 0))
    theta = model.config.rope_parameters["rope_theta"]
    rotated = [
        rotate_neighbours(
            (x @ torch.from_numpy(tensors[f"blk.0.attn_{name}.weight"][1].copy()).T).unflatten(
                1, (-1, 32)
            ),
            positions,
            theta,
        )
        for name in "qk"
    ]
    scores = torch.einsum("qhd,khd->hqk", rotated[0], rotated[1].repeat_interleave(4, 1))
    tolerance = 1e-4 if attention is None else 0.02
    assert largest_difference(scores, expected) < tolerance * expected.abs().max()


def test_packed_attention_is_rounded_to_float16_by_default(wide: Wide, tmp_path: Path) -> None:
    exact = tensors_of(export_folder(wide("2bit"), tmp_path / "a", attention=Type.F32))
    rounded = tensors_of(export_folder(wide("2bit"), tmp_path / "b"))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        kind, weights = rounded[f"blk.0.{name}.weight"]
        assert kind == "F16"
        assert np.array_equal(weights, exact[f"blk.0.{name}.weight"][1].astype(np.float16))


@pytest.mark.parametrize(("kind", "largest"), [("Q8_0", 0.006), ("Q4_1", 0.002), ("Q4_K", 0.08)])
def test_attention_takes_the_chosen_type(
    wide: Wide, tmp_path: Path, kind: str, largest: float
) -> None:
    exact = tensors_of(export_folder(wide("2bit"), tmp_path / "a", attention=Type.F32))
    read = tensors_of(export_folder(wide("2bit"), tmp_path / "b", attention=type_named(kind)))
    for name in ("attn_q", "attn_output"):
        expected = exact[f"blk.0.{name}.weight"][1]
        assert read[f"blk.0.{name}.weight"][0] == kind
        error = read[f"blk.0.{name}.weight"][1] - expected
        assert np.sqrt((error**2).mean()) < largest * expected.std()


def test_packed_head_takes_the_attentions_type(wide: Wide, tmp_path: Path) -> None:
    file = export_folder(wide("2bit", head_bits=4), tmp_path / "m.gguf", attention=Type.Q8_0)
    assert tensors_of(file)["output.weight"][0] == "Q8_0"


def test_float32_source_keeps_float32_embeddings_and_attention(tmp_path: Path) -> None:
    source = write_wide_source(tmp_path / "source", dtype=torch.float32)
    folder = convert_wide(source, tmp_path / "out", attn_bits=16)
    tensors = tensors_of(export_folder(folder, tmp_path / "m.gguf"))
    kinds = {name.split(".")[-2]: kind for name, (kind, _) in tensors.items()}
    assert {kinds[name] for name in ("token_embd", "output", "attn_q")} == {"F32"}
    assert kinds["ffn_down_exps"] == "Q2_K"


def test_tied_head_is_left_out(tmp_path: Path) -> None:
    source = write_wide_source(tmp_path / "source", tie_word_embeddings=True)
    folder = convert_wide(source, tmp_path / "out", "16bit")
    tensors = tensors_of(export_folder(folder, tmp_path / "m.gguf"))
    assert "token_embd.weight" in tensors
    assert "output.weight" not in tensors


@pytest.mark.parametrize(
    ("recipe", "experts", "expected"),
    [
        ("3bit", "Q3_K", "Q3_K"),
        ("2bit", "Q3_K", "Q2_K"),
        ("2bit", "F16", "F16"),
        ("4bit", "Q4_1", "Q4_1"),
        ("paper-2bit", "Q4_K", "Q4_K"),
        ("16bit", "Q8_0", "Q8_0"),
    ],
)
def test_chosen_type_replaces_larger_types_and_missing_ones(
    wide: Wide, tmp_path: Path, recipe: str, experts: str, expected: str
) -> None:
    tensors = tensors_of(
        export_folder(wide(recipe), tmp_path / "m.gguf", experts=type_named(experts))
    )
    assert {kind for name, (kind, _) in tensors.items() if "_exps" in name} == {expected}


def test_experts_without_an_exact_type_are_refused_with_choices(wide: Wide, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"tile32-q4-g64-s8 exactly; choose one of f32") as error:
        export_folder(wide("4bit"), tmp_path / "m.gguf")
    assert error.value.hint == "add --experts q4_1"


def test_one_layers_experts_of_two_packings_need_a_choice(wide: Wide, tmp_path: Path) -> None:
    folder = wide("2bit", rules=("0:1=3bit",))
    with pytest.raises(RecipeError, match=r"layer 0: gate .*q2-g16-s4 and .* together exactly"):
        export_folder(folder, tmp_path / "m.gguf")
    plan = plan_export(
        Artifact.open(folder), loader.load_tokenizer(folder), ExportOptions(experts=Type.Q4_K)
    )
    losses = {tensor.name: set(tensor.losses) for tensor in plan.tensors}
    assert losses["blk.0.ffn_up_exps.weight"] == {"exact", "lossy: requantized"}
    assert losses["blk.1.ffn_up_exps.weight"] == {"exact"}


def test_columns_that_do_not_fit_are_refused_for_blocks_alone(
    converted: Callable[[str], Path], tmp_path: Path
) -> None:
    message = r"blk.0.ffn_gate_exps.weight: 192 columns; Q2_K needs a multiple of 256"
    with pytest.raises(RecipeError, match=message) as error:
        export_folder(converted("2bit"), tmp_path / "m.gguf")
    assert "--experts f16" in error.value.hint
    file = export_folder(converted("2bit"), tmp_path / "m.gguf", experts=Type.F32)
    check_experts(converted("2bit"), file, ["F32"] * 16)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "olmoe"])
def test_other_model_types_are_refused_by_name(tmp_path: Path, model_type: str) -> None:
    from random_models import write_checkpoint

    source = write_checkpoint(tmp_path / "source", model_type, fused=False)
    folder = convert_wide(source, tmp_path / "out", "16bit")
    with pytest.raises(MoeConvertError, match=f"model type {model_type} cannot be exported"):
        plan_export(Artifact.open(folder), None, ExportOptions())


def test_sizes_and_constants_are_the_models(tmp_path: Path) -> None:
    fields = {"sliding_window": 100, "head_dim": 48, "rms_norm_eps": 1e-6}
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 12345.0}
    source = write_wide_source(tmp_path / "source", **fields, rope_parameters=rope)
    folder = convert_wide(source, tmp_path / "out", "16bit")
    read = fields_of(export_folder(folder, tmp_path / "m.gguf", license="apache-2.0"))
    assert {name: value for name, value in read.items() if name.startswith("llama.")} == {
        "llama.context_length": 100,
        "llama.embedding_length": 256,
        "llama.block_count": 2,
        "llama.feed_forward_length": 512,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 48,
        "llama.attention.value_length": 48,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "llama.expert_count": 4,
        "llama.expert_used_count": 2,
        "llama.vocab_size": 4096,
        "llama.rope.dimension_count": 48,
        "llama.rope.freq_base": 12345.0,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 4.0,
    }
    assert read["general.architecture"] == "llama"
    assert read["general.name"] == "source"
    assert read["general.license"] == "apache-2.0"
    assert read["general.file_type"] == 32
    assert read["general.quantization_version"] == 2


def test_rope_type_that_is_not_exported_is_refused_by_name(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}
    source = write_wide_source(tmp_path / "source", head_dim=32, rope_parameters=rope)
    folder = convert_wide(source, tmp_path / "out", "16bit")
    with pytest.raises(MoeConvertError, match="rope_type 'yarn' cannot be exported"):
        plan_export(Artifact.open(folder), None, ExportOptions())


def test_same_folder_gives_the_same_bytes(wide: Wide, tmp_path: Path) -> None:
    files = [export_folder(wide("2bit"), tmp_path / name) for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


class CountingReader(MmapReader):
    """Counts the experts whose bytes are alive at the same time."""

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact)
        self.alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
        self.most = 0

    def read(self, layer: int, expert: int) -> torch.Tensor:
        blob = super().read(layer, expert).clone()
        self.alive.add(blob)
        self.most = max(self.most, len(self.alive))
        return blob


def test_one_expert_is_in_memory_and_a_part_of_it_is_written_at_once(tmp_path: Path) -> None:
    source = write_wide_source(tmp_path / "source", intermediate_size=8192, num_hidden_layers=1)
    folder = convert_wide(source, tmp_path / "out", "16bit")
    artifact = Artifact.open(folder)
    plan = plan_export(artifact, loader.load_tokenizer(folder), ExportOptions(experts=Type.F32))
    written = [0]
    with CountingReader(artifact) as reader:
        write_gguf(plan, reader, tmp_path / "m.gguf", lambda _, done, total: written.append(done))
        assert reader.most == 1
    assert written[-1] <= plan.total_bytes
    experts = np.diff(written)[-4 * 3 * 2 :]
    assert set(experts) == {4 * CHUNK_WEIGHTS}


def test_interrupted_export_leaves_nothing_and_keeps_the_old_file(
    wide: Wide, tmp_path: Path
) -> None:
    out = tmp_path / "m.gguf"
    out.write_bytes(b"old")

    def interrupt(_stage: str, done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_folder(wide("2bit"), out, interrupt)
    assert out.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("name", ["experts/layer-001.safetensors", "trunk.safetensors"])
def test_damaged_folder_is_refused(wide_source: Path, tmp_path: Path, name: str) -> None:
    folder = convert_wide(wide_source, tmp_path / "folder")
    flip(folder / name, (folder / name).stat().st_size - 5000)
    with pytest.raises(DamageError, match=name):
        export_folder(folder, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_disk_without_space_is_refused_before_writing(
    wide: Wide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DoesNotFitError, match=r"the file needs \d+ bytes, free are 1000"):
        export_folder(wide("2bit"), tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []
