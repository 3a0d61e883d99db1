"""The loaded model compared with a plain transformers Mixtral with the dequantized weights."""

import contextlib
import threading

import pytest
import torch
from loaded_models import BACKENDS, apart, dequantized, load, logits, slots_budget
from transformers import MixtralConfig, MixtralForCausalLM, pipeline

import loader
from formats.artifact import Artifact
from formats.errors import DoesNotFitError, MoeConvertError, RecipeError
from loader.arithmetic import kernels
from loader.budget.expert_sizes import expert_bytes_by_layer

RECIPES = ("2bit", "3bit", "4bit", "paper-2bit", "paper-3bit")
PROMPT = "So Jonah arose, and went to Nineveh, according to"


@pytest.fixture(scope="module")
def tokenizer(converted):
    return loader.load_tokenizer(converted("2bit"))


@pytest.fixture(scope="module")
def model(converted):
    return load(converted("2bit"))


@pytest.fixture(scope="module")
def plain(converted):
    return dequantized(converted("2bit"))


@pytest.fixture(scope="module")
def ids(tokenizer, example_folder):
    text = (example_folder / "README.md").read_text()
    return tokenizer(text, return_tensors="pt")["input_ids"][:, :100]


def test_tokenizer_adds_bos_as_the_source_does(tokenizer, example_folder):
    assert (
        tokenizer(PROMPT)["input_ids"] == loader.load_tokenizer(example_folder)(PROMPT)["input_ids"]
    )
    assert tokenizer(PROMPT)["input_ids"][0] == tokenizer.bos_token_id


def test_the_model_is_transformers_own_class(model):
    assert isinstance(model, MixtralForCausalLM)
    assert not model.training


@pytest.mark.parametrize("recipe", RECIPES)
def test_logits_of_a_prompt_are_those_of_the_dequantized_weights(converted, ids, recipe):
    folder = converted(recipe)
    assert apart(logits(load(folder), ids), logits(dequantized(folder), ids)) < 1e-3


@pytest.mark.skipif(not kernels.available(), reason="not built")
@pytest.mark.parametrize("recipe", ["2bit", "4bit"])
def test_native_logits_differ_by_the_rounding_of_activations_only(converted, ids, recipe):
    folder = converted(recipe)
    ours, exact = logits(load(folder, kernels="native"), ids), logits(dequantized(folder), ids)
    assert ((ours - exact).square().mean().sqrt() / exact.std()).item() < 0.05


def test_logits_token_by_token_are_those_of_the_dequantized_weights(model, plain, ids):
    with torch.inference_mode():
        past, steps = None, []
        for position in range(40):
            output = model(
                input_ids=ids[:, position : position + 1], past_key_values=past, use_cache=True
            )
            past = output.past_key_values
            steps.append(output.logits)
    assert apart(torch.cat(steps, 1), logits(plain, ids[:, :40])) < 1e-3


def test_a_padded_batch_gives_the_logits_of_the_dequantized_weights(model, plain, tokenizer):
    texts = [PROMPT, "def f(x):", "The", "int set"]
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    real = batch["attention_mask"].bool()
    assert not real.all()
    mask = {"attention_mask": batch["attention_mask"]}
    ours, theirs = (
        logits(model, batch["input_ids"], **mask),
        logits(plain, batch["input_ids"], **mask),
    )
    assert apart(ours[real], theirs[real]) < 1e-3


@pytest.mark.parametrize(
    "texts", [[PROMPT], [PROMPT, "def f(x):", "The", "int set"]], ids=["batch-1", "batch-4"]
)
def test_generate_gives_the_tokens_of_the_dequantized_weights(model, plain, tokenizer, texts):
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    arguments = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(
        model.generate(**arguments, **options), plain.generate(**arguments, **options)
    )


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("io", ["mmap", "direct"])
@pytest.mark.parametrize("slots", [0, 1, 2, 3, 8])
def test_budget_and_reader_do_not_change_a_bit(converted, ids, kernels, io, slots):
    folder = converted("2bit")
    free = load(folder, kernels=kernels)
    tight = load(folder, ram_cache=slots_budget(folder, slots), io=io, kernels=kernels)
    assert torch.equal(logits(tight, ids), logits(free, ids))
    for position in range(8):
        one = ids[:, position : position + 1]
        assert torch.equal(logits(tight, one), logits(free, one))
    assert (tight.moe_stats().total.evictions > 0) == (0 < slots < 8)


def test_stats_count_each_expert_of_each_token(converted, ids):
    model = load(converted("2bit"))
    for position in range(10):
        logits(model, ids[:, position : position + 1])
    stats = model.moe_stats()
    assert all(layer.hits + layer.misses == 20 for layer in stats.layers)
    assert (
        stats.total.bytes_read
        == stats.total.misses * expert_bytes_by_layer(Artifact.open(converted("2bit")))[0]
    )
    assert stats.as_dict()["hits"] == sum(layer["hits"] for layer in stats.as_dict()["layers"])
    model.reset_moe_stats()
    assert model.moe_stats().total.misses == 0


def test_a_prompt_asks_for_each_expert_once_a_layer(converted, ids):
    folder = converted("2bit")
    model = load(folder, ram_cache=slots_budget(folder, 3))
    logits(model, ids)
    assert all(0 < layer.hits + layer.misses <= 8 for layer in model.moe_stats().layers)


def test_least_budget_works_and_one_byte_less_is_refused(converted):
    folder = converted("2bit")
    least = slots_budget(folder, 0)
    assert load(folder, ram_cache=least).moe_stats().slots == (0,) * 8
    with pytest.raises(DoesNotFitError, match=str(least)):
        load(folder, ram_cache=least - 1)


def test_two_models_of_one_folder_do_not_share_counters(converted, ids):
    first, second = load(converted("2bit")), load(converted("2bit"))
    logits(first, ids)
    assert first.moe_stats().total.misses > 0
    assert second.moe_stats().total.misses == 0


@pytest.mark.parametrize("kernels", BACKENDS)
def test_concurrent_threads_generate_the_tokens_of_one_alone(converted, tokenizer, kernels):
    folder = converted("2bit")
    prompts = [tokenizer(text, return_tensors="pt") for text in (PROMPT, "def f(x):\n    return")]
    model = load(folder, ram_cache=slots_budget(folder, 2), kernels=kernels)

    def generate(prompt):
        arguments = {name: prompt[name] for name in ("input_ids", "attention_mask")}
        return model.generate(**arguments, max_new_tokens=12, do_sample=False, pad_token_id=2)

    alone = [generate(prompt) for prompt in prompts]
    together = [None, None]

    def work(number):
        together[number] = generate(prompts[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_pipeline_takes_the_model(model, tokenizer):
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = generator(PROMPT, max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert text.startswith(PROMPT)
    assert len(text) > len(PROMPT)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"dtype": None}, torch.bfloat16),
        ({}, torch.float32),
        ({"dtype": torch.float16}, torch.float16),
    ],
)
def test_dtype_is_the_configs_unless_another_is_asked_for(converted, options, dtype):
    model = load(converted("2bit"), **options)
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    assert kinds == {dtype}
    assert logits(model, torch.tensor([[1, 5]])).dtype == dtype


def test_attn_implementation_is_transformers_own_option(converted, ids):
    folder = converted("2bit")
    eager = load(folder, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    assert apart(logits(eager, ids), logits(load(folder, attn_implementation="sdpa"), ids)) < 1e-3


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"device": "tpu"}, "'tpu' is unknown; known are auto, cpu, cuda"),
        ({"device": "cuda:x"}, "'cuda:x' is unknown"),
        ({"device": []}, "does not name each GPU once"),
        ({"cpu_share": "half"}, "half"),
        ({"io": "telepathy"}, "telepathy"),
        ({"kernels": "fast"}, "fast"),
        ({"ram_cache": "lots"}, "lots"),
    ],
)
def test_unknown_options_are_refused_by_value(converted, options, part):
    with pytest.raises(MoeConvertError, match=part):
        load(converted("2bit"), **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "cuda:0,cuda:1"])
def test_a_missing_gpu_is_refused_with_the_reason(converted, device):
    with pytest.raises(
        MoeConvertError, match=rf"device {device.replace(',', ', ')}: torch .*(without CUDA|no GPU)"
    ):
        load(converted("2bit"), device=device)


def test_missing_native_kernels_are_refused_with_the_reason(converted, monkeypatch):
    monkeypatch.setattr(kernels, "available", lambda: False)
    monkeypatch.setattr(kernels, "describe", lambda: "torch (slow): no library")
    with pytest.raises(RecipeError, match="no library"):
        load(converted("2bit"), kernels="native")
    assert load(converted("2bit"), kernels="auto") is not None


def test_the_model_is_not_saved_as_if_it_were_a_checkpoint(model, tmp_path):
    # Newer versions raise, older ones log an error and return.
    with contextlib.suppress(ValueError):
        model.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.glob("saved/*.safetensors"))


def test_a_tied_head_is_tied(tmp_path):
    from converter.convert import convert_checkpoint
    from converter.recipe.recipes import make_recipe

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        sliding_window=None,
        dtype="float32",
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "out", make_recipe("4bit", solver="hqq"))
    model = load(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.arange(20)[None]
    assert apart(logits(model, ids), logits(dequantized(tmp_path / "out"), ids)) < 1e-3
