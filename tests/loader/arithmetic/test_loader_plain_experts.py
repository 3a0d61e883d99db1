"""Experts in 16 bits, loaded: the original's logits with any cache; fast paths leave unsupported
cases.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loaded_models import BACKENDS, apart, dequantized, load, logits, slots_budget
from make_checkpoint import SHAPES, make_checkpoint
from random_weights import blob_of
from single_tokens import IDS, token_by_token
from transformers import MixtralForCausalLM

from converter.convert import ConvertOptions, convert_checkpoint
from converter.recipe.recipes import make_recipe
from formats.expert import ExpertLayout
from formats.packing import packing_named
from formats.tiles import expert_weights
from loader.arithmetic import kernels
from loader.arithmetic.backend import choose_backend
from loader.arithmetic.plain_experts import PlainExperts

RULES = "0=16bit,1/down=16bit,2/gate_up=16bit,3:0-3=rows-f16,4:5/down=rows-f16"
native = pytest.mark.skipif(not kernels.available(), reason="not built")

Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(example_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Folders: 16bit (everything), attn4 (16-bit experts, packed attention), mixed, zstd."""
    root = tmp_path_factory.mktemp("plain")
    recipes = {
        "16bit": make_recipe("16bit"),
        "attn4": make_recipe(bits=16, solver="hqq"),
        "mixed": make_recipe(rules=[RULES], solver="hqq"),
        "zstd": make_recipe("16bit"),
    }

    def of(name: str) -> Path:
        if not (root / name).exists():
            codec = "zstd" if name == "zstd" else "none"
            convert_checkpoint(
                example_folder, root / name, recipes[name], ConvertOptions(codec=codec)
            )
        return root / name

    return of


@pytest.fixture(scope="module")
def original(example_folder: Path) -> dict[torch.dtype, torch.Tensor]:
    """transformers' logits of the checkpoint itself."""
    return {
        dtype: logits(MixtralForCausalLM.from_pretrained(example_folder, dtype=dtype).eval(), IDS)
        for dtype in (torch.float32, torch.bfloat16)
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_in_float32_are_the_originals(
    folder: Folder, original: dict[torch.dtype, torch.Tensor], backend: str
) -> None:
    model = load(folder("16bit"), kernels=backend)
    for found in (logits(model, IDS), token_by_token(model)):
        assert apart(found, original[torch.float32]) < 2e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_in_bfloat16_are_about_as_near_as_transformers_own(
    folder: Folder, original: dict[torch.dtype, torch.Tensor], backend: str
) -> None:
    exact = original[torch.float32]

    def off(found: torch.Tensor) -> float:
        return float((found.float() - exact).square().mean().sqrt())

    model = load(folder("16bit"), kernels=backend, dtype=torch.bfloat16)
    for found in (logits(model, IDS), token_by_token(model)):
        # A token whose router nearly ties goes either way: 1.15 to 1.35 were seen.
        assert off(found) < 2 * off(original[torch.bfloat16])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["16bit", "attn4", "mixed", "zstd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_cache_gives_the_same_bits(
    folder: Folder, name: str, dtype: torch.dtype, backend: str
) -> None:
    options: dict[str, Any] = {"kernels": backend, "dtype": dtype}
    whole = load(folder(name), ram_cache="40GiB", **options)
    small = load(folder(name), ram_cache=slots_budget(folder(name), 3), io="direct", **options)
    assert torch.equal(logits(small, IDS), logits(whole, IDS))
    assert torch.equal(token_by_token(small), token_by_token(whole))


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_a_mixed_folder_are_those_of_its_weights(folder: Folder, backend: str) -> None:
    exact = logits(dequantized(folder("mixed")), IDS)
    model = load(folder("mixed"), kernels=backend, ram_cache="1GiB")
    # Tiles round activations to int8 where the kernels are native.
    limit = 1e-3 if backend == "torch" else 0.05
    for found in (logits(model, IDS), token_by_token(model)):
        assert ((found - exact).square().mean().sqrt() / exact.std()).item() < limit


@native
def test_single_tokens_of_a_mixed_folder_take_the_decoder(folder: Folder) -> None:
    model = load(folder("mixed"), kernels="native", ram_cache="1GiB")
    token_by_token(model)
    assert model.moe_stats().paths.decoder == IDS.shape[1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 9, 40])
@pytest.mark.parametrize(
    "packings", [("rows-bf16", "rows-bf16"), ("rows-f16", "rows-f16"), ("rows-bf16", "rows-f16")]
)
def test_experts_are_those_of_float64(packings: tuple[str, str], tokens: int, backend: str) -> None:
    layout = ExpertLayout(72, 104, *map(packing_named, packings))
    blobs = {e: blob_of(layout, e) for e in (0, 1, 3)}
    rng = torch.Generator().manual_seed(9)
    x = torch.randn(tokens, 72, generator=rng)
    index = torch.stack([torch.randperm(2, generator=rng) * 3 for _ in range(tokens)])
    weights = torch.rand(tokens, 2, generator=rng)
    if tokens > 1:
        index[0, 0] = 1
    out = torch.ones_like(x)
    choose_backend(backend).experts(blobs, dict.fromkeys(blobs, layout), x, index, weights, out)
    expected = torch.ones_like(x).double()
    for e, blob in blobs.items():
        gate, up, down = (part.double() for part in expert_weights(layout, blob))
        result = (torch.nn.functional.silu(x.double() @ gate.T) * (x.double() @ up.T)) @ down.T
        expected += result * (weights * (index == e)).sum(1, keepdim=True)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-6)


@native
def test_activations_of_a_bfloat16_model_may_be_multiplied_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    layout = ExpertLayout(64, 96, packing_named("rows-bf16"), packing_named("rows-bf16"))
    blob = blob_of(layout, 0)
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    gate, up, down = expert_weights(layout, blob)
    exact = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    off = (PlainExperts().run(layout, blob, x) - exact).norm() / exact.norm()
    assert 1e-4 < off < 6e-3
    # One activation that bfloat16 does not hold, and nothing is rounded.
    x[3, 5] = 1 + 2**-12
    exact = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    assert (PlainExperts().run(layout, blob, x) - exact).norm() / exact.norm() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_fp16_model_has_its_own_logits(tmp_path: Path, backend: str) -> None:
    make_checkpoint(tmp_path / "mini", SHAPES["mini"], 3, dtype="F16")
    convert_checkpoint(tmp_path / "mini", tmp_path / "out", make_recipe("16bit"))
    exact = logits(
        MixtralForCausalLM.from_pretrained(tmp_path / "mini", dtype=torch.float32).eval(), IDS
    )
    assert apart(logits(load(tmp_path / "out", kernels=backend), IDS), exact) < 2e-5
    model = load(tmp_path / "out", kernels=backend, dtype="auto")
    assert model.dtype is torch.float16
    assert apart(token_by_token(model).float(), exact) < 0.05
