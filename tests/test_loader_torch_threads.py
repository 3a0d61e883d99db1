"""Few tokens run on one torch thread, and torch's number is back afterwards."""

import copy
import inspect
import threading

import pytest
import torch
from torch import nn

import loader
from loader import torch_threads
from loader.torch_threads import FEW_TOKENS, run_few_tokens_on_one_thread


class Probe(nn.Module):
    """Notes torch's threads; does what it is told inside its forward."""

    def __init__(self, inside=lambda: None):
        super().__init__()
        self.seen, self.inside = [], inside

    def forward(self, input_ids=None, inputs_embeds=None):
        self.seen.append(torch.get_num_threads())
        self.inside()
        self.seen.append(torch.get_num_threads())


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert not torch_threads._passes.outside
    torch.set_num_threads(before)


def probe(inside=lambda: None):
    module = Probe(inside)
    run_few_tokens_on_one_thread(module)
    return module


FEW, MANY = torch.zeros(2, FEW_TOKENS // 2), torch.zeros(1, FEW_TOKENS + 1)


@pytest.mark.parametrize(
    ("call", "threads"),
    [
        (lambda m: m(FEW), 1),
        (lambda m: m(input_ids=FEW), 1),
        (lambda m: m(inputs_embeds=torch.zeros(2, 4, 64)), 1),
        (lambda m: m(MANY), 3),
        (lambda m: m(input_ids=MANY), 3),
        (lambda m: m(inputs_embeds=torch.zeros(2, 5, 64)), 3),
    ],
)
def test_few_tokens_run_on_one_thread_and_many_on_torchs(call, threads):
    module = probe()
    call(module)
    assert module.seen == [threads] * 2
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_number_is_back_after_an_exception(error):
    def fail():
        raise error

    module = probe(fail)
    with pytest.raises(error):
        module(FEW)
    assert torch.get_num_threads() == 3
    module.inside = lambda: None
    module(FEW)
    assert torch.get_num_threads() == 3


def test_nested_passes_count_as_one():
    inner = probe()
    outer = probe(lambda: (inner(FEW), inner(MANY), inner(FEW)))
    outer(FEW)
    assert outer.seen == [1, 1]
    assert torch.get_num_threads() == 3
    outer(MANY)
    assert outer.seen[2:] == [3, 3]
    assert torch.get_num_threads() == 3


def test_a_thread_that_begins_during_anothers_pass_gets_torchs_number():
    many = probe()
    seen = []

    def start():
        thread = threading.Thread(target=lambda: (many(MANY), seen.append(torch.get_num_threads())))
        thread.start()
        thread.join()

    few = probe(start)
    few(FEW)
    assert many.seen == [3, 3]
    assert seen == [3]
    assert few.seen[0] == 1
    assert torch.get_num_threads() == 3


def test_the_number_is_back_when_passes_of_two_threads_overlap():
    inside, leave = threading.Event(), threading.Event()
    first = probe(lambda: (inside.set(), leave.wait(10)))
    second = probe()
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


def test_the_signature_stays():
    assert list(inspect.signature(probe().forward).parameters) == ["input_ids", "inputs_embeds"]


def test_a_copy_runs_itself():
    module = probe()
    other = copy.deepcopy(module)
    other(FEW)
    assert (module.seen, other.seen) == ([], [1, 1])


def test_tokens_are_the_same_whatever_torchs_threads_are(converted):
    model = loader.from_pretrained(converted("2bit"))
    ids = torch.arange(5, 45)[None]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=2))
        assert torch.get_num_threads() == threads
    assert all(torch.equal(result, results[0]) for result in results)
