import numpy as np
import pytest
import torch
from torch.nn.functional import linear

from formats.errors import MoeConvertError
from loader.hf.loading.plain_checkpoint import load_checkpoint
from loader.model import from_pretrained
from loader.traces.routing_recorder import RoutingRecorder


@pytest.fixture(scope="module")
def model(example_folder):
    return load_checkpoint(example_folder)


@pytest.fixture
def ids():
    return torch.randint(3, 4096, (2, 12), generator=torch.Generator().manual_seed(0))


def record(model, *batches):
    with RoutingRecorder(model, 4) as recorder, torch.inference_mode():
        for ids in batches:
            model.model(input_ids=ids, use_cache=False)
        return recorder.take()


def test_experts_and_weights_are_those_of_the_routers_probabilities(model, ids):
    logits = []
    hooks = [
        layer.mlp.gate.register_forward_hook(
            lambda m, x, y: logits.append(linear(x[0].reshape(24, -1), m.weight))
        )
        for layer in model.model.layers
    ]
    found = record(model, ids)
    for hook in hooks:
        hook.remove()
    for layer, of_layer in enumerate(logits):
        weights, experts = of_layer.float().softmax(-1).topk(2)
        np.testing.assert_array_equal(found.experts[:, layer], experts.numpy())
        np.testing.assert_allclose(
            found.weights[:, layer], weights / weights.sum(1, keepdim=True), atol=1e-3
        )
    assert found.experts.dtype == np.uint8 and found.weights.dtype == np.float16


@torch.no_grad()
def test_guesses_are_the_next_router_on_this_input_under_either_norm(model, ids):
    seen = {}
    layers = model.model.layers
    hooks = [
        layers[3].mlp.gate.register_forward_hook(lambda m, x, y: seen.update(input=x[0].float())),
        layers[3].post_attention_layernorm.register_forward_hook(
            lambda m, x, y: seen.update(residual=x[0].float())
        ),
    ]
    found = record(model, ids)
    for hook in hooks:
        hook.remove()
    following, norm = layers[4].mlp.gate.weight.float(), layers[4].post_attention_layernorm
    residual = seen["residual"].reshape(24, -1)
    scaled = (
        residual
        / (residual.pow(2).mean(1, keepdim=True) + norm.variance_epsilon).sqrt()
        * norm.weight.float()
    )
    for name, x in (("guesses", seen["input"].reshape(24, -1)), ("guesses_next_norm", scaled)):
        expected = (x @ following.T).argsort(1, descending=True)[:, :4]
        np.testing.assert_array_equal(getattr(found, name)[:, 3], expected.numpy())
    assert found.guesses.shape == (24, 7, 4)


def test_batches_are_recorded_row_by_row_in_the_order_of_the_calls(model, ids):
    together, apart = record(model, ids), record(model, ids[:1], ids[1:])
    np.testing.assert_array_equal(together.experts, apart.experts)
    np.testing.assert_array_equal(together.guesses, apart.guesses)


def test_one_token_at_a_time_is_recorded_like_all_at_once(converted, ids):
    model = from_pretrained(converted("2bit"))
    with RoutingRecorder(model, 4) as recorder, torch.inference_mode():
        model.generate(ids[:1], max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=2)
        decoded = recorder.take()
    whole = record(model, ids[:1])
    # The last of the three new tokens does not go through the model.
    assert decoded.experts.shape == (14, 8, 2)
    np.testing.assert_array_equal(decoded.experts[:12], whole.experts)


def test_nothing_listens_afterwards(model, ids):
    def hooks():
        return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]

    before = hooks()
    with RoutingRecorder(model, 4):
        assert hooks() != before
    assert hooks() == before


def test_a_model_without_routers_is_refused():
    with pytest.raises(MoeConvertError, match="Linear has no routers"):
        RoutingRecorder(torch.nn.Linear(2, 2), 4)
