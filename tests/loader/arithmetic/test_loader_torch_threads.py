"""Few tokens run on one torch thread; torch's number of threads is restored afterwards."""

import inspect
import threading

import pytest
import torch
from inside import inside
from transformers import MixtralForCausalLM

import loader
from loader.arithmetic import torch_threads
from loader.arithmetic.torch_threads import FEW_TOKENS, torch_threads_for


class Probe:
    """A pass of `tokens` tokens that records torch's threads and calls the test's function."""

    def __init__(self, inside=lambda: None):
        self.seen, self.inside = [], inside

    def __call__(self, tokens):
        with torch_threads_for(tokens):
            self.seen.append(torch.get_num_threads())
            self.inside()
            self.seen.append(torch.get_num_threads())


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert not inside(torch_threads, "passes").outside
    torch.set_num_threads(before)


FEW, MANY = FEW_TOKENS, FEW_TOKENS + 1


@pytest.mark.parametrize(("tokens", "threads"), [(1, 1), (FEW, 1), (MANY, 3)])
def test_few_tokens_run_on_one_thread_and_many_on_torchs(tokens, threads):
    probe = Probe()
    probe(tokens)
    assert probe.seen == [threads] * 2
    assert torch.get_num_threads() == 3


@torch.no_grad()
@pytest.mark.parametrize(
    ("call", "threads"),
    [
        (lambda m, ids: m(ids[:, :FEW]), 1),
        (lambda m, ids: m(ids[:, :4].repeat(2, 1)), 1),
        (lambda m, ids: m(input_ids=ids[:, :MANY]), 3),
        (lambda m, ids: m(inputs_embeds=m.model.embed_tokens(ids[:, :FEW])), 1),
        (lambda m, ids: m(inputs_embeds=m.model.embed_tokens(ids[:, :MANY])), 3),
    ],
)
def test_a_models_few_tokens_run_on_one_thread(converted, call, threads):
    model, seen = loader.from_pretrained(converted("2bit")), []
    model.model.norm.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    call(model, torch.arange(5, 25)[None])
    assert seen == [threads]
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_number_is_back_after_an_exception(error):
    def fail():
        raise error

    module = Probe(fail)
    with pytest.raises(error):
        module(FEW)
    assert torch.get_num_threads() == 3
    module.inside = lambda: None
    module(FEW)
    assert torch.get_num_threads() == 3


def test_nested_passes_count_as_one():
    inner = Probe()
    outer = Probe(lambda: (inner(FEW), inner(MANY), inner(FEW)))
    outer(FEW)
    assert outer.seen == [1, 1]
    assert torch.get_num_threads() == 3
    outer(MANY)
    assert outer.seen[2:] == [3, 3]
    assert torch.get_num_threads() == 3


def test_a_thread_that_begins_during_anothers_pass_gets_torchs_number():
    many = Probe()
    seen = []

    def start():
        thread = threading.Thread(target=lambda: (many(MANY), seen.append(torch.get_num_threads())))
        thread.start()
        thread.join()

    few = Probe(start)
    few(FEW)
    assert many.seen == [3, 3]
    assert seen == [3]
    assert few.seen[0] == 1
    assert torch.get_num_threads() == 3


def test_the_number_is_back_when_passes_of_two_threads_overlap():
    inside, leave = threading.Event(), threading.Event()
    first = Probe(lambda: (inside.set(), leave.wait(10)))
    second = Probe()
    numbers = []
    thread = threading.Thread(target=lambda: (first(FEW), numbers.append(torch.get_num_threads())))
    thread.start()
    inside.wait(10)
    second(FEW)
    numbers.append(torch.get_num_threads())
    leave.set()
    thread.join()
    assert second.seen == [1, 1]
    assert numbers == [3, 3]
    assert torch.get_num_threads() == 3


def test_the_signatures_of_a_model_are_those_of_its_class(converted):
    model = loader.from_pretrained(converted("2bit"))
    for name in ("forward", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation"):
        ours, theirs = (
            inspect.signature(getattr(owner, name)) for owner in (type(model), MixtralForCausalLM)
        )
        assert ours == theirs


def test_tokens_are_the_same_whatever_torchs_threads_are(converted):
    model = loader.from_pretrained(converted("2bit"))
    ids = torch.arange(5, 45)[None]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=2))
        assert torch.get_num_threads() == threads
    assert all(torch.equal(result, results[0]) for result in results)
