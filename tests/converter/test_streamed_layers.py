"""transformers' layers, run one at a time, give the whole model's results; other models are
refused.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import MODELS, write_checkpoint
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from converter.calibration import calibration_pass
from converter.calibration.calibration_pass import CalibrationPass
from converter.calibration.calibration_text import CalibrationTokens
from converter.calibration.layer_statistics import LayerStatistics
from converter.checkpoint.source import Checkpoint
from converter.forward.layer_calls import CallRecorder, LayerCall
from converter.forward.layer_forward import LayerForward
from converter.forward.loaded_layer import AbsentExperts, CurrentRun, HeardLinear, LoadedLayer
from converter.forward.ordered_tasks import one_by_one
from converter.forward.streamed_model import StreamedModel
from converter.forward.trunk_weights import TrunkWeights
from formats.errors import SourceError

WINDOWS = torch.randint(3, 128, (6, 40), generator=torch.Generator().manual_seed(0))
WEIGHTS = torch.tensor([1.0, 1.0, 2.0, 0.5, 1.0, 3.0])


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a random model -> its checkpoint."""
    root = tmp_path_factory.mktemp("random")

    def write(name: str) -> Path:
        folder = root / name
        return folder if folder.exists() else write_checkpoint(folder, name, fused=False)

    return write


class Heard:
    """A whole transformers model that records the inputs of its modules.

    inputs: by module path, each input flattened over tokens.
    """

    def __init__(self, folder: Path, paths: list[str]) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.inputs: dict[str, list[Tensor]] = {}
        for path in paths:
            self.model.get_submodule(path).register_forward_pre_hook(self._hook(path))
        with torch.no_grad():
            self.logits = self.model(input_ids=WINDOWS, use_cache=False).logits

    def _hook(self, path: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        return lambda _, inputs: self.inputs.__setitem__(path, [x.flatten(0, -2) for x in inputs])


def moment(x: Tensor, weights: Tensor) -> Tensor:
    x = x.double()
    return (x * weights.double()[:, None]).T @ x / weights.double().sum()


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert float((found.double() - expected).norm()) < 2e-6 * float(expected.norm())


@pytest.mark.parametrize("name", MODELS)
def test_streamed_logits_and_choices_are_those_of_the_whole_model(
    folder_of: Callable[[str], Path], name: str
) -> None:
    with Checkpoint(folder_of(name)) as checkpoint:
        whole = Heard(checkpoint.folder, [module.path for module in checkpoint.shape.experts])
        streamed = StreamedModel(checkpoint, WINDOWS)
        streamed.run()
        for number, (logits, chosen) in enumerate(streamed.predictions()):
            expected = whole.logits[number]
            assert float((logits(0, 40) - expected).abs().max()) < 1e-4 * float(expected.std())
            rows = slice(number * 40, (number + 1) * 40)
            for layer, module in enumerate(checkpoint.shape.experts):
                assert torch.equal(chosen[layer], whole.inputs[module.path][1][rows])


@pytest.mark.parametrize("name", MODELS)
def test_statistics_are_those_of_hooks_in_the_whole_model(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(calibration_pass, "fast_products", lambda _: torch.float32)
    weights = WEIGHTS.repeat_interleave(40)
    with Checkpoint(folder_of(name)) as checkpoint:
        shape = checkpoint.shape
        whole = Heard(
            checkpoint.folder, [*shape.linears, *(module.path for module in shape.experts)]
        )
        passes = CalibrationPass(
            checkpoint, CalibrationTokens("random", WINDOWS, WEIGHTS), tmp_path, "test", one_by_one
        )
        found = [passes.prepare(layer) for layer in range(len(shape.decoder_layers))]
        linears = {path: s for layer in found for path, s in layer.linears.items()}
        if not shape.tied:
            linears |= passes.prepare_head().linears
        assert linears.keys() == shape.linears.keys()
        for path, statistics in linears.items():
            assert_near(statistics.hessian[0], moment(whole.inputs[path][0], weights))
        for module in shape.experts:
            experts = whole.model.get_submodule(module.path)
            check_experts(found[module.decoder_layer], experts, whole.inputs[module.path], weights)


def check_experts(
    statistics: LayerStatistics, experts: Any, inputs: list[Tensor], weights: Tensor
) -> None:
    """Compare with an experts module of transformers and its recorded inputs."""
    x, chosen, _ = inputs
    assert_near(statistics.gate_up.hessian[0], moment(x, weights))
    inner, inner_weights = [], []
    for expert in range(len(experts.down_proj)):
        reached = (chosen == expert).any(1)
        assert torch.equal(statistics.experts[expert].tokens, reached.nonzero()[:, 0])
        gate, up = (x[reached] @ experts.gate_up_proj[expert].T).chunk(2, dim=1)
        inner.append((nn.functional.silu(gate) * up).detach())
        inner_weights.append(weights[reached])
        torch.testing.assert_close(
            statistics.experts[expert].inner.float(), inner[-1], rtol=2**-8, atol=1e-6
        )
    down = moment(torch.cat(inner), torch.cat(inner_weights))
    assert_near(statistics.down.hessian[0, : len(down), : len(down)], down)


@pytest.fixture
def checkpoint(folder_of: Callable[[str], Path]) -> Iterator[Checkpoint]:
    with Checkpoint(folder_of("mixtral")) as opened:
        yield opened


def test_narrow_products_skip_routers_norms_and_small_linears(checkpoint: Checkpoint) -> None:
    weights, layer = TrunkWeights(checkpoint, torch.bfloat16), "model.layers.0"
    found = {}
    for path in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate", "input_layernorm"):
        module = checkpoint.shape.model.get_submodule(f"{layer}.{path}")
        if isinstance(module, nn.Linear):
            module = HeardLinear(module, path, CurrentRun())
        with weights.filled(module, f"{layer}.{path}"):
            found[path] = module.weight.dtype
        assert module.weight.is_meta
    # q has 64 rows, k 32.
    assert found.pop("self_attn.q_proj") == torch.bfloat16
    assert set(found.values()) == {torch.float32}


class ChangedRotary(nn.Module):
    """Position embeddings that also add `change` of the hidden states."""

    def __init__(self, rotary: nn.Module, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.rotary = rotary
        self.change = change

    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        cos, sin = self.rotary(x, position_ids=position_ids)
        return cos + self.change(x), sin


def test_a_model_whose_layers_get_hidden_states_beside_the_stream_is_refused(
    checkpoint: Checkpoint,
) -> None:
    model = checkpoint.shape.model.model
    model.rotary_emb = ChangedRotary(model.rotary_emb, lambda x: x.mean())
    forward = LayerForward(checkpoint)
    with pytest.raises(
        SourceError,
        match=r"layer 0: argument position_embeddings depends on tokens or hidden states",
    ):
        forward.layer(0, 16).__enter__()


def test_a_model_whose_layers_share_an_object_is_refused(checkpoint: Checkpoint) -> None:
    class Shared(nn.Module):
        def forward(self, *_: Any, **__: Any) -> Any:
            return {"seen": object()}

    checkpoint.shape.model.model.rotary_emb = Shared()
    with pytest.raises(
        SourceError, match=r"position_embeddings seen is a object, which layers may change"
    ):
        LayerForward(checkpoint).layer(0, 16).__enter__()


def test_a_model_that_changes_hidden_states_between_layers_is_refused() -> None:
    recorder = CallRecorder(0, "config.json")
    after = recorder.visit(0, torch.zeros(1, 4, 8), (), {})
    recorder.visit(1, after, (), {})
    with pytest.raises(SourceError, match="changes the hidden states between layers 1 and 2"):
        recorder.visit(2, after, (), {})


def test_a_model_that_leaves_out_a_layer_is_refused() -> None:
    with pytest.raises(SourceError, match="layer 1 is called where layer 0 is expected"):
        CallRecorder(0, "config.json").visit(1, torch.zeros(1, 4, 8), (), {})


class Layer(nn.Module):
    """A layer that calls its experts `calls` times."""

    def __init__(self, calls: int, current: CurrentRun) -> None:
        super().__init__()
        self.calls = calls
        self.experts = AbsentExperts(current)

    def forward(self, stream: Tensor) -> Tensor:
        flat = stream.flatten(0, 1)
        for _ in range(self.calls):
            flat = flat + self.experts(
                flat, torch.zeros(len(flat), 1, dtype=torch.int64), torch.ones(len(flat), 1)
            )
        return flat.view(stream.shape)


def test_a_layer_that_calls_its_experts_twice_is_refused() -> None:
    current, stream, summed = CurrentRun(), torch.ones(1, 4, 8), torch.ones(4, 8)
    once, twice, never = (
        LoadedLayer(Layer(calls, current), LayerCall((), {}), current, 0, "config.json")
        for calls in (1, 2, 0)
    )
    assert torch.equal(once.end(stream, summed)[0], stream + 1)
    with pytest.raises(SourceError, match="Layer calls its experts twice"):
        twice.end(stream, summed)
    with pytest.raises(SourceError, match="Layer does not call its experts"):
        never.begin(stream)
