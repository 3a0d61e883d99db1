"""Gradients through the loaded model are those of a plain Mixtral that holds the dequantized
weights.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_host import COMPILER
from loaded_models import dequantized
from recording_device import RecordingDevice
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from training import batch, loaded

import loader
from converter.convert import convert_checkpoint
from converter.recipe.recipes import make_recipe
from formats.artifact import Artifact
from formats.errors import FormatError, MoeConvertError

CACHES = ("all", "two", "mmap")

Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The checkpoint of three layers by name: 2bit (attention packed), 16bit, mixed (plain rows
    beside tiles), head4 (the head packed too).
    """
    root = tmp_path_factory.mktemp("gradients")
    recipes = {
        "2bit": make_recipe("2bit", solver="hqq"),
        "16bit": make_recipe("16bit"),
        "mixed": make_recipe(rules=["0=16bit,1/down=16bit,2/gate_up=rows-f16"], solver="hqq"),
        "head4": make_recipe("4bit", head_bits=4, solver="hqq"),
    }

    def of(name: str) -> Path:
        if not (root / name).exists():
            convert_checkpoint(source, root / name, recipes[name])
        return root / name

    return of


def embedding_gradient(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """Return the loss's gradient for the embeddings of `ids`; all parameters get theirs too."""
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    model.zero_grad()
    model(inputs_embeds=embeddings, labels=ids, **options).loss.backward()
    return embeddings.grad


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


def assert_same_gradients(ours: torch.Tensor, exact: torch.Tensor) -> None:
    assert cosine(ours, exact) > 1 - 1e-6
    assert ((ours - exact).norm() / exact.norm()).item() < 1e-3


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["2bit", "16bit", "mixed", "head4"])
def test_gradients_of_embeddings_and_parameters_are_those_of_the_dequantized_weights(
    folder: Folder, name: str, cache: str
) -> None:
    model, plain, ids = loaded(folder(name), cache), dequantized(folder(name)), batch()
    assert_same_gradients(embedding_gradient(model, ids), embedding_gradient(plain, ids))
    exact = dict(plain.named_parameters())
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert {
        n for n in exact if "norm" in n or "mlp.gate" in n or n == "lm_head.weight"
    } - found.keys() == ({"lm_head.weight"} if name == "head4" else set())
    for parameter, gradient in found.items():
        assert_same_gradients(gradient, exact[parameter].grad)


def test_gradients_of_the_reference_kernels_are_those_of_the_dequantized_weights(
    folder: Folder,
) -> None:
    ours = embedding_gradient(loaded(folder("2bit"), kernels="torch"), batch())
    exact = embedding_gradient(dequantized(folder("2bit")), batch())
    assert ((ours - exact).norm() / exact.norm()).item() < 1e-5


def test_gradients_of_a_padded_batch_and_of_single_tokens_are_right(folder: Folder) -> None:
    model, plain = loaded(folder("2bit"), "two"), dequantized(folder("2bit"))
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[0, :9] = 0
    options = {"attention_mask": mask}
    assert_same_gradients(
        embedding_gradient(model, batch(), **options), embedding_gradient(plain, batch(), **options)
    )
    # One token's loss has no target: the largest logit instead.
    grads = []
    for each in (model, plain):
        one = each.get_input_embeddings()(torch.tensor([[77]])).detach().requires_grad_(True)
        each(inputs_embeds=one).logits.max().backward()
        grads.append(one.grad)
    assert_same_gradients(*grads)


def test_gradients_are_the_same_bits_whatever_the_cache(folder: Folder) -> None:
    first, *others = (
        embedding_gradient(loaded(folder("mixed"), cache), batch()) for cache in CACHES
    )
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_with_16_bit_activations_are_about_as_near_as_transformers_own(
    folder: Folder, dtype: torch.dtype
) -> None:
    exact = embedding_gradient(dequantized(folder("2bit")), batch())
    model, plain = loaded(folder("2bit"), dtype=dtype), dequantized(folder("2bit")).to(dtype)
    ours, theirs = (1 - cosine(embedding_gradient(each, batch()), exact) for each in (model, plain))
    assert ours < 2 * theirs + 1e-4 and ours < 0.05


def test_gradients_under_autocast_are_about_as_near_as_transformers_own(folder: Folder) -> None:
    exact = embedding_gradient(dequantized(folder("mixed")), batch())
    found = []
    for model in (
        loaded(folder("mixed")),
        loaded(folder("mixed"), kernels="torch"),
        dequantized(folder("mixed")),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(1 - cosine(embedding_gradient(model, batch()), exact))
    assert max(found[:2]) < 2 * found[2] + 1e-4 and max(found) < 0.01


@pytest.mark.parametrize("name", ["2bit", "16bit"])
def test_checkpointed_layers_give_the_same_gradients(folder: Folder, name: str) -> None:
    model, ids = loaded(folder(name), "two"), batch()
    expected = embedding_gradient(model, ids)
    model.gradient_checkpointing_enable()
    model.train()
    assert torch.equal(embedding_gradient(model, ids), expected)
    model.gradient_checkpointing_disable()
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_(True)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return model(inputs_embeds=x, labels=ids, use_cache=False).loss

    for reentrant in (False, True):
        embeddings.grad = None
        checkpoint(loss, embeddings, use_reentrant=reentrant).backward()
        assert torch.equal(embeddings.grad, expected)


def test_prompt_tuning_ends_where_the_dequantized_model_ends(folder: Folder) -> None:
    for name in ("2bit", "16bit"):
        losses = [
            tuned_prompt_loss(model)
            for model in (loaded(folder(name), "two"), dequantized(folder(name)))
        ]
        assert losses[0] == pytest.approx(losses[1], rel=0.02)


def tuned_prompt_loss(model: Any) -> float:
    ids = batch(1)
    soft = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    optimizer = torch.optim.Adam([soft], lr=0.1)
    embeddings = model.get_input_embeddings()(ids).detach()
    labels = torch.cat([torch.full((1, 4), -100), ids], 1)
    first: float | None = None
    for _ in range(30):
        loss = model(inputs_embeds=torch.cat([soft, embeddings], 1), labels=labels).loss
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert first is not None and loss.item() < first - 0.1
    return loss.item()


def test_the_forward_pass_keeps_inputs_only(folder: Folder) -> None:
    layer = loaded(folder("2bit"), "two").model.layers[0]
    x = torch.randn(30, 64, requires_grad=True)
    index, weights = torch.tensor([[0, 2]] * 30), torch.rand(30, 2)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer.mlp.experts(x, index, weights)
        assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, index, weights)}
        kept.clear()
        q_proj = layer.self_attn.q_proj
        q_proj(x)
        assert {t.data_ptr() for t in kept} == {q_proj.packed.data_ptr()}


def test_a_pass_with_unused_gradients_gives_the_logits_of_the_dequantized_weights(
    folder: Folder,
) -> None:
    model = loaded(folder("2bit"), "two").requires_grad_(False)
    found, exact = model(batch()).logits, dequantized(folder("2bit"))(batch()).logits
    assert not found.requires_grad
    assert ((found - exact).norm() / exact.norm()).item() < 1e-3


def test_a_single_token_with_gradients_enabled_follows_the_prompt(folder: Folder) -> None:
    model, plain = loaded(folder("2bit")), dequantized(folder("2bit"))
    ids = batch(1, 9)
    for freeze in (False, True):
        model.requires_grad_(not freeze)
        with torch.no_grad() if freeze else nullcontext():
            past = model(ids, use_cache=True).past_key_values
        found = model(ids[:, :1], past_key_values=past).logits[:, -1]
        exact = plain(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1]
        assert found.requires_grad is not freeze
        assert ((found - exact).norm() / exact.norm()).item() < 0.03


def test_routers_can_be_tuned(folder: Folder) -> None:
    losses = []
    for model in (loaded(folder("2bit"), "two"), dequantized(folder("2bit"))):
        model.requires_grad_(False)
        routers = [layer.mlp.gate.weight.requires_grad_(True) for layer in model.model.layers]
        optimizer = torch.optim.SGD(routers, lr=0.3)
        for _ in range(5):
            loss = model(batch(), labels=batch()).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_second_derivative_is_refused(folder: Folder) -> None:
    model = loaded(folder("2bit"))
    embeddings = model.get_input_embeddings()(batch()).detach().requires_grad_(True)
    loss = model(inputs_embeds=embeddings, labels=batch()).loss
    (grad,) = torch.autograd.grad(loss, embeddings, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.square().sum().backward()


def test_a_file_cut_before_the_backward_is_reported(folder: Folder, tmp_path: Path) -> None:
    convert = folder("16bit")
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in convert.rglob("*"):
        if path.is_file():
            (copy / path.relative_to(convert)).parent.mkdir(exist_ok=True)
            (copy / path.relative_to(convert)).write_bytes(path.read_bytes())
    model = loaded(copy, "two")
    loss = model(batch(), labels=batch()).loss
    for path in copy.glob("experts/layer-*.safetensors"):
        with open(path, "rb+") as file:
            file.truncate(4096)
    with pytest.raises(FormatError, match=r"layer-002.*layer 2 expert \d.*ends after"):
        loss.backward()


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_on_a_gpu_the_backward_says_that_it_is_not_there(folder: Folder) -> None:
    layers = Artifact.open(folder("2bit")).architecture.num_hidden_layers
    model = loader.from_pretrained(folder("2bit"), device=RecordingDevice(), slots=[2] * layers)
    with pytest.raises(MoeConvertError, match=r"gradients .* not implemented on a GPU") as raised:
        embedding_gradient(model, batch(1))
    assert 'device="cpu"' in str(raised.value.hint)
    assert not model.hf_quantizer.is_trainable
