"""The GPU decoder, whose kernels run on this CPU, gives the bits of the CPU decoder."""

import copy
import json
import shutil

import pytest
import torch
from cuda_host import COMPILER
from inside import inside
from recording_device import RecordingDevice
from torch import nn
from transformers import DynamicCache
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

import loader
from converter.convert import convert_checkpoint
from converter.recipe.recipes import make_recipe
from loader.arithmetic import kernels
from loader.arithmetic.native_backend import NativeBackend
from loader.budget.expert_sizes import expert_bytes_by_layer
from loader.cuda.decode.cpu_part import CpuPart
from loader.cuda.decode.decoder_factory import CudaDecoderFactory
from loader.cuda.decode.gpu_decoder import CudaDecoder
from loader.cuda.experts.cpu_share import CpuShare, Speeds
from loader.cuda.experts.gpu_reader import GpuReader
from loader.cuda.experts.pinned_tier import PinnedTier
from loader.cuda.products.packed_products import Products
from loader.decode.decoder_call import TokenRequest
from loader.decode.path_counters import LeaveDecoder
from loader.decode.weights import LayerWeights
from loader.experts.buffers import Memory
from loader.experts.cache import ExpertCache
from loader.hf.decoder_path import DecoderPath
from loader.hf.served_model import Serving
from loader.repository import open_model

pytestmark = pytest.mark.skipif(
    not kernels.available() or COMPILER is None, reason="not built, or no C++ compiler"
)

DTYPES = [torch.float32, torch.bfloat16]
IDS = torch.arange(7, 47)[None]


@pytest.fixture(scope="module")
def folder_of(source, tmp_path_factory):
    """Return a function: head bits, experts per token -> folder of a three-layer model."""
    root = tmp_path_factory.mktemp("models")

    def folder(head_bits=16, top_k=2):
        out = root / f"{head_bits}-{top_k}"
        if not out.exists():
            checkpoint = shutil.copytree(source, root / f"source-{head_bits}-{top_k}")
            config = json.loads((checkpoint / "config.json").read_text())
            (checkpoint / "config.json").write_text(
                json.dumps({**config, "num_experts_per_tok": top_k})
            )
            convert_checkpoint(
                checkpoint, out, make_recipe("2bit", solver="hqq", head_bits=head_bits)
            )
        return out

    return folder


class Gpu:
    """A `RecordingDevice` and the decoders on it."""

    def __init__(self, order=0):
        self.device = RecordingDevice()
        self.device.thread_order = order
        self.factory = CudaDecoderFactory(self.device, Products(self.device))
        self.paths = {}

    def load(self, folder, dtype, **options):
        """Return a model whose tokens this device decodes."""
        model = load(folder, dtype, **options)
        model.serve(Serving(model.model.layers[0].mlp.experts.cache, self.factory))
        return model

    def take_experts(self, model, folder, slots, ram, speeds=None):
        """Give `model` slots on the device, over a tier of `ram` experts.

        With `speeds` the CPU computes a share.
        """
        opened = open_model(folder, None, None, lazy=False, progress=None)
        before = model.model.layers[0].mlp.experts.cache
        sizes = expert_bytes_by_layer(opened.artifact)
        tier = PinnedTier(
            opened.reader("direct", check="none"),
            dict.fromkeys(sizes, ram),
            self.device.pin,
            self.device.unpin,
        )
        reader = GpuReader(tier, [self.device] * len(sizes))
        cache = ExpertCache(
            reader, slots, memory=[Memory(self.device.empty)] * len(sizes), tier=tier
        )
        cache.prefetcher = before.prefetcher
        for layer in model.model.layers:
            layer.mlp.experts._cache = cache
        share = speeds and CpuShare(cache, tier, speeds)
        self.factory = CudaDecoderFactory(
            self.device, Products(self.device), share, NativeBackend()
        )

    def __call__(self, model, ids, cache, **options):
        """Return the decoder's logits; None if it leaves the token to transformers."""
        options = {"past_key_values": cache, "use_cache": True, "return_dict": True, **options}
        try:
            if model not in self.paths:
                self.paths[model] = DecoderPath(model, self.factory)
            return self.paths[model].run((ids,), options).logits
        except LeaveDecoder:
            return None


def load(folder, dtype, **options):
    return loader.from_pretrained(
        folder, kernels="native", dtype=dtype, **{"ram_cache": "1GiB", **options}
    )


def prompted(model, ids):
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    return cache


@torch.no_grad()
def compare(folder, dtype, *, prompt=8, tokens=6, order=0, ids=IDS, **options):
    """Decode on CPU and GPU after a prompt, and compare all results bit by bit."""
    cpu, gpu = load(folder, dtype), Gpu(order)
    model = gpu.load(folder, dtype, **options)
    caches = prompted(cpu, ids[:, :prompt]), prompted(model, ids[:, :prompt])
    for token in ids[:, prompt : prompt + tokens].split(1, 1):
        expected = cpu(token, past_key_values=caches[0], use_cache=True).logits
        assert torch.equal(gpu(model, token, caches[1]), expected)
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
    return model, gpu


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_keys_and_values_are_the_cpus(folder_of, dtype, order):
    compare(folder_of(), dtype, order=order)


@pytest.mark.parametrize("dtype", DTYPES)
def test_positions_beyond_the_first_span_and_the_memorys_first_size(folder_of, dtype):
    ids = (torch.arange(1030) * 7 % 4096)[None]
    compare(folder_of(), dtype, prompt=510, tokens=5, ids=ids)
    compare(folder_of(), dtype, prompt=1023, tokens=3, ids=ids)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_head_is_the_cpus(folder_of, dtype):
    compare(folder_of(head_bits=4), dtype, tokens=3)


@pytest.mark.parametrize("top_k", [1, 3])
def test_other_numbers_of_experts_with_room_for_few_are_the_cpus(folder_of, top_k):
    compare(folder_of(top_k=top_k), torch.float32, slots=[1, 2, 0])


@torch.no_grad()
@pytest.mark.parametrize("order", ["late", "early", 0, 1])
@pytest.mark.parametrize(("top_k", "slots"), [(2, [2, 1, 0]), (3, [2, 1, 1])])
def test_experts_that_are_copied_to_few_slots_give_the_same_bits_without_a_race(
    folder_of, order, top_k, slots
):
    cpu, gpu = load(folder_of(top_k=top_k), torch.bfloat16), Gpu()
    model, past = load(folder_of(top_k=top_k), torch.bfloat16), prompted(cpu, IDS[:, :8])
    gpu.device.order = order
    gpu.take_experts(model, folder_of(top_k=top_k), slots, ram=6)
    copied = copy.deepcopy(past)
    for token in IDS[:, 8:20].split(1, 1):
        assert torch.equal(
            gpu(model, token, copied), cpu(token, past_key_values=past, use_cache=True).logits
        )
    stats = model.model.layers[0].mlp.experts.cache.stats().total
    assert stats.misses > 12 and stats.guesses > 0
    assert not gpu.device.races
    assert gpu.device.syncs_of() == [f"event on {gpu.device.compute_stream().name}"] * 12 * 3


@torch.no_grad()
@pytest.mark.parametrize("cpu_speed", [1.5e9, 1e12])
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_that_the_cpu_computes_give_the_same_bits(folder_of, monkeypatch, dtype, cpu_speed):
    made, add = [], CpuPart.add
    monkeypatch.setattr(
        CpuPart,
        "add",
        lambda self, blobs, *rest: made.append(len(blobs)) or add(self, blobs, *rest),
    )
    cpu, gpu = load(folder_of(), dtype), Gpu()
    model, past = load(folder_of(), dtype), prompted(cpu, IDS[:, :8])
    gpu.take_experts(
        model, folder_of(), [1, 1, 0], 9, Speeds(link_bytes_per_s=1e9, cpu_bytes_per_s=cpu_speed)
    )
    copied = copy.deepcopy(past)
    for token in IDS[:, 8:24].split(1, 1):
        assert torch.equal(
            gpu(model, token, copied), cpu(token, past_key_values=past, use_cache=True).logits
        )
    assert made and (cpu_speed < 1e10 or 2 in made)
    assert not gpu.device.races
    assert gpu.device.syncs_of() == [f"event on {gpu.device.compute_stream().name}"] * 16 * 3


@torch.no_grad()
def test_the_host_waits_once_a_layer(folder_of):
    model, gpu = compare(folder_of(), torch.bfloat16, tokens=2)
    layers = len(model.model.layers)
    assert len(gpu.device.synchronisations) == 2 * layers
    assert {what for _, what in gpu.device.synchronisations} == {
        f"event on {gpu.device.compute_stream().name}"
    }


def test_nine_launches_a_layer_when_all_experts_are_there(folder_of):
    _, gpu = compare(folder_of(), torch.bfloat16, tokens=1)
    launches = [name for kind, name in gpu.device.log if kind == "launch"]
    assert len(launches) == 9 * 3 + 2


@torch.no_grad()
def test_the_next_layers_experts_are_guessed_as_on_the_cpu(folder_of, monkeypatch):
    gpu = Gpu()

    def guesses(run):
        model = (run.load if run is gpu else load)(folder_of(), torch.float32, slots=[2, 2, 2])
        cache, made = model.model.layers[0].mlp.experts.cache, []
        past, inner = prompted(model, IDS[:, :8]), cache.guess
        monkeypatch.setattr(
            cache,
            "guess",
            lambda layer, experts: made.append((layer, experts)) or inner(layer, experts),
        )
        for token in IDS[:, 8:20].split(1, 1):
            run(model, token, past)
        return made

    ours = guesses(gpu)
    assert len(ours) == 12 * 2 and {layer for layer, _ in ours} == {1, 2}
    assert ours == guesses(
        lambda model, token, past: model(token, past_key_values=past, use_cache=True)
    )


@torch.no_grad()
def test_experts_are_asked_for_as_on_the_cpu(folder_of):
    counts = []
    for gpu in (Gpu(), None):
        model = (gpu.load if gpu else load)(folder_of(), torch.bfloat16)
        past = prompted(model, IDS[:, :8])
        model.reset_moe_stats()
        for token in IDS[:, 8:12].split(1, 1):
            model(token, past_key_values=past, use_cache=True)
        counts.append([layer.hits + layer.misses for layer in model.moe_stats().layers])
    assert counts[0] == counts[1] == [8, 8, 8]


@torch.no_grad()
def test_float16_differs_from_transformers_code_by_rounding(folder_of):
    gpu = Gpu()
    model = gpu.load(folder_of(), torch.float16)
    caches = prompted(model, IDS[:, :8]), prompted(model, IDS[:, :8])
    ours = torch.cat(
        [gpu(model, token, caches[0]) for token in IDS[:, 8:16].split(1, 1)], 1
    ).float()
    plain = torch.cat(
        [
            model.model(token, past_key_values=caches[1]).last_hidden_state
            for token in IDS[:, 8:16].split(1, 1)
        ],
        1,
    )
    plain = model.lm_head(plain).float()
    assert (ours - plain).square().mean().sqrt() < 0.05 * plain.std()


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_generate_gives_the_cpus_tokens(folder_of, dtype):
    results = []
    for gpu in (None, Gpu()):
        model = (gpu.load if gpu else load)(folder_of(), dtype)
        results.append(
            model.generate(IDS[:, :8], max_new_tokens=12, do_sample=False, pad_token_id=2)
        )
    assert len(gpu.device.synchronisations) == 11 * 3
    assert torch.equal(*results)


@torch.no_grad()
def test_weights_that_were_exchanged_are_taken_up(folder_of):
    cpu, gpu = load(folder_of(), torch.bfloat16), Gpu()
    model = gpu.load(folder_of(), torch.bfloat16)
    for change in (
        lambda m: setattr(
            m.model.embed_tokens, "weight", nn.Parameter(m.model.embed_tokens.weight.flip(0))
        ),
        lambda m: m.model.norm.weight.data.mul_(2.0),
        lambda m: m.to(torch.float32),
    ):
        logits = []
        for one, run in (
            (cpu, lambda *a: cpu(a[1], past_key_values=a[2], use_cache=True).logits),
            (model, gpu),
        ):
            change(one)
            logits.append(run(one, IDS[:, 8:9], prompted(one, IDS[:, :8])))
        assert torch.equal(*logits)


@torch.no_grad()
def test_what_asks_for_more_is_left_to_transformers(folder_of):
    gpu = Gpu()
    model = gpu.load(folder_of(), torch.bfloat16)
    cache = prompted(model, IDS[:, :8])
    for options in (
        {"output_hidden_states": True},
        {"attention_mask": torch.zeros(1, 9)},
        {"labels": IDS[:, :1]},
    ):
        assert gpu(model, IDS[:, 8:9], cache, **options) is None
    handle = model.model.layers[1].mlp.gate.register_forward_hook(lambda *_: None)
    assert gpu(model, IDS[:, 8:9], cache) is None
    handle.remove()
    assert gpu(model, IDS[:, 8:10], cache) is None
    assert gpu(model, IDS[:, 8:9], cache, attention_mask=torch.ones(1, 9)) is not None


@pytest.mark.parametrize("mask", [None, torch.ones(1, 9), torch.tensor([[1, 0, *[1] * 7]])])
@pytest.mark.parametrize("positions", [[], [8], [8, 7]])
def test_one_copy_brings_what_pointers_show_on_the_cpu(mask, positions):
    numbers = [torch.tensor([[position]]) for position in positions]
    request = TokenRequest(torch.tensor([[31]]), DynamicCache(), mask, numbers)
    assert inside(request, "copied_numbers")() == inside(request, "numbers")()
    if positions != [8, 7] and (mask is None or bool(mask.all())):
        assert request.token_after(8) == 31
        return
    with pytest.raises(LeaveDecoder):
        request.token_after(8)


@torch.no_grad()
def test_experts_of_several_layouts_are_left_to_transformers(folder_of, monkeypatch):
    gpu = Gpu()
    model = gpu.load(folder_of(), torch.bfloat16)
    monkeypatch.setattr(LayerWeights, "layout", None)
    assert gpu(model, IDS[:, 8:9], prompted(model, IDS[:, :8])) is None


@torch.no_grad()
def test_an_expert_that_cannot_be_read_leaves_the_cache_as_it_was(folder_of, monkeypatch):
    gpu = Gpu()
    model = gpu.load(folder_of(), torch.bfloat16)
    past, source = prompted(model, IDS[:, :8]), model.model.layers[0].mlp.experts.cache
    lease = source.lease

    def failing(layer, experts):
        if layer == 2:
            raise OSError("gone")
        return lease(layer, experts)

    with monkeypatch.context() as patch:
        patch.setattr(source, "lease", failing)
        with pytest.raises(OSError, match="gone"):
            gpu(model, IDS[:, 8:9], past)
    assert [layer.get_seq_length() for layer in past.layers] == [8] * 3
    other = load(folder_of(), torch.bfloat16)
    expected = other(
        IDS[:, 8:9], past_key_values=prompted(other, IDS[:, :8]), use_cache=True
    ).logits
    assert torch.equal(gpu(model, IDS[:, 8:9], past), expected)


def replace_router(model):
    gate = model.model.layers[1].mlp.gate
    gate.weight = nn.Parameter(-gate.weight, requires_grad=False)


def assign_norm_data(model):
    norm = model.model.layers[0].post_attention_layernorm
    norm.weight.data = norm.weight.data * 3


def exchange_keys(model):
    one, other = (model.model.layers[n].self_attn.k_proj for n in (1, 0))
    one.packed = other.packed


def use_three_experts(model):
    for layer in model.model.layers:
        layer.mlp.gate.top_k = 3


def change_scaling(model):
    for layer in model.model.layers:
        layer.self_attn.scaling = 2.0


def change_eps(model):
    norms = model.model.layers[2].input_layernorm, model.model.layers[2].post_attention_layernorm
    for norm in norms:
        norm.variance_epsilon = 0.5


def change_eps_of_one_norm(model):
    model.model.layers[1].input_layernorm.variance_epsilon = 0.5


def change_frequencies(model):
    model.model.rotary_emb.inv_freq.mul_(0.5)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        replace_router,
        assign_norm_data,
        exchange_keys,
        use_three_experts,
        change_scaling,
        change_eps,
        change_eps_of_one_norm,
        change_frequencies,
    ],
)
def test_what_changes_after_the_first_token_is_followed(folder_of, change):
    cpu, gpu = load(folder_of(), torch.float32), Gpu()
    model = gpu.load(folder_of(), torch.float32)
    caches = prompted(cpu, IDS[:, :8]), prompted(model, IDS[:, :8])
    for number, token in enumerate(IDS[:, 8:12].split(1, 1)):
        if number == 2:
            unchanged = cpu(token, past_key_values=copy.deepcopy(caches[0]), use_cache=True).logits
            change(cpu)
            change(model)
        expected = cpu(token, past_key_values=caches[0], use_cache=True).logits
        assert torch.equal(gpu(model, token, caches[1]), expected)
        assert number != 2 or not torch.equal(expected, unchanged)


def narrow_router(layer):
    layer.mlp.gate.weight = nn.Parameter(torch.zeros(3, 64).bfloat16(), requires_grad=False)


def use_one_expert(layer):
    layer.mlp.gate.top_k = 1


def change_scaling_of_one(layer):
    layer.self_attn.scaling = 2.0


class OtherRouter(MixtralTopKRouter):
    """A router class that the decoder does not know."""


def give_another_router(layer):
    layer.mlp.gate.__class__ = OtherRouter


@torch.no_grad()
@pytest.mark.parametrize(
    "change", [narrow_router, use_one_expert, change_scaling_of_one, give_another_router]
)
def test_layers_that_differ_are_left_to_transformers(folder_of, change):
    gpu = Gpu()
    model = gpu.load(folder_of(), torch.bfloat16)
    past = prompted(model, IDS[:, :8])
    assert change is give_another_router or gpu(model, IDS[:, 8:9], past) is not None
    change(model.model.layers[1])
    assert gpu(model, IDS[:, 9:10], past) is None


def test_the_decoder_is_made_once(folder_of, monkeypatch):
    made, init = [], CudaDecoder.__init__
    monkeypatch.setattr(
        CudaDecoder, "__init__", lambda self, *args: made.append(1) or init(self, *args)
    )
    compare(folder_of(), torch.bfloat16, tokens=3)
    assert len(made) == 1
