"""Models in forked children and in copies, and waits for dead threads: each works, or the error
names the next step.
"""

import copy
import io
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from forked import in_child, needs_fork
from inside import inside
from pattern_reader import GpuCache
from project_paths import SEARCH_PATH
from slow_reader import SlowReader
from torch.utils.data import DataLoader, Dataset

import loader
from converter.convert import convert_checkpoint
from converter.recipe.recipes import make_recipe
from formats.errors import MoeConvertError
from formats.reading.fork_gate import ForkGate, shared_gate
from loader.experts import fetcher, monitor
from loader.experts.cache import ExpertCache

IDS = torch.tensor([[1, 17, 300, 42, 99]])


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("forked") / "mini"
    convert_checkpoint(source, folder, make_recipe("2bit", solver="hqq"))
    return folder


@pytest.fixture
def load(folder):
    """A model, by default with two slots for four experts in each layer."""
    return lambda slots=2: loader.from_pretrained(folder, slots=[slots] * 3, io="direct")


@pytest.fixture(autouse=True)
def look_often(monkeypatch):
    monkeypatch.setattr(monitor, "CHECK_EVERY_S", 0.05)


def generated(model):
    result = model.generate(
        IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=2
    )
    return result[0].tolist()


def get(cache, layer, experts):
    with cache.lease(layer, experts) as lease:
        return {expert: int(blob[0]) for expert, blob in lease.all().items()}


@needs_fork
@pytest.mark.parametrize("slots", [0, 2, 4])
@pytest.mark.parametrize("used", [False, True])
def test_a_forked_child_gives_the_same_tokens(load, slots, used):
    model, wanted = load(slots), generated(load())
    if used:
        generated(model)
    assert in_child(lambda: generated(model)) == wanted
    assert in_child(lambda: in_child(lambda: generated(model))) == wanted
    assert generated(model) == wanted


@needs_fork
def test_children_that_are_forked_while_another_thread_generates_give_the_same_tokens(load):
    model = load()
    wanted = generated(model)
    found, stop = [], threading.Event()

    def work():
        while not stop.is_set():
            found.append(generated(model))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert [in_child(lambda: generated(model)) for _ in range(8)] == [wanted] * 8
    finally:
        stop.set()
        thread.join(60)
    assert found == [wanted] * len(found) != []


@needs_fork
def test_a_child_reads_again_what_a_thread_of_its_parent_was_reading():
    reader = SlowReader(held=True)
    cache = ExpertCache(reader, 2)
    thread = threading.Thread(target=get, args=(cache, 0, [0, 1]))
    thread.start()
    reader.wait_until_asked(0, 0)

    def child():
        reader._held = False
        return get(cache, 0, [2, 1])

    assert in_child(child) == {2: 2, 1: 1}
    for expert in (0, 1):
        reader.let(0, expert)
    thread.join(60)
    assert not thread.is_alive()


@needs_fork
def test_a_child_works_after_torch_ran_on_several_threads(load):
    model = load()
    wanted, before = generated(model), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.randn(1000, 1000).softmax(-1)
        assert in_child(
            lambda: (generated(model), torch.randn(1000, 1000).softmax(-1).shape[0])
        ) == (wanted, 1000)
    finally:
        torch.set_num_threads(before)


@needs_fork
def test_a_model_on_a_gpu_refuses_to_work_in_a_child():
    gpu = GpuCache(2)
    gpu.token(0, [0, 1])
    error = in_child(lambda: gpu.token(0, [2, 3]))
    assert isinstance(error, MoeConvertError)
    assert "GPU" in error.message
    assert "spawn" in error.hint
    gpu.token(0, [2, 3])
    gpu.check_counts()


class Generated(Dataset):
    """A dataset of two equal rows: the model's tokens after a prompt."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 2

    def __getitem__(self, number):
        return torch.tensor(generated(self.model))


@needs_fork
def test_a_data_loaders_forked_workers_may_use_the_model(load):
    model = load()
    wanted = generated(model)
    rows = DataLoader(Generated(model), num_workers=2, multiprocessing_context="fork", timeout=60)
    assert [row[0].tolist() for row in rows] == [wanted] * 2


@pytest.mark.parametrize("method", ["pickle", "torch.save", "spawn", "forkserver"])
def test_what_pickles_a_model_says_that_each_process_loads_it(load, folder, method):
    model = load()
    generated(model)
    with pytest.raises(MoeConvertError, match="cannot be pickled") as raised:
        if method == "pickle":
            pickle.dumps(model)
        elif method == "torch.save":
            torch.save(model, io.BytesIO())
        else:
            multiprocessing.get_context(method).Process(target=generated, args=(model,)).start()
    assert (
        raised.value.hint
        == f"load it in each process: loader.from_pretrained({os.fspath(folder)!r})"
    )


@pytest.mark.parametrize("slots", [2, 4])
def test_a_deep_copy_gives_the_same_tokens_from_the_same_cache(load, slots):
    model = load(slots)
    wanted = generated(model)
    other = copy.deepcopy(model)
    assert generated(other) == wanted
    assert other.model.layers[0].mlp.experts.cache is model.model.layers[0].mlp.experts.cache
    projection = other.model.layers[0].self_attn.q_proj
    assert projection.packed.data_ptr() != model.model.layers[0].self_attn.q_proj.packed.data_ptr()
    with torch.no_grad():
        other.model.norm.weight.zero_()
    assert generated(model) == wanted


def test_a_fork_waits_for_direct_reads_and_holds_up_others():
    gate, reading, leave, forked = (
        ForkGate(),
        threading.Event(),
        threading.Event(),
        threading.Event(),
    )

    def read():
        with gate.read():
            reading.set()
            leave.wait(60)
            assert not forked.is_set()

    thread = threading.Thread(target=read)
    thread.start()
    reading.wait(60)
    threading.Timer(0.05, leave.set).start()
    gate.before_fork()
    forked.set()
    assert leave.is_set()
    later = threading.Thread(target=lambda: gate.read().__enter__())
    later.start()
    later.join(0.05)
    assert later.is_alive()
    gate.after_in_parent()
    later.join(60)
    thread.join(60)
    assert not later.is_alive()


def test_direct_reads_pass_the_gate(load, monkeypatch):
    passed = []
    read = ForkGate.read
    monkeypatch.setattr(ForkGate, "read", lambda self: passed.append(self) or read(self))
    generated(load())
    assert set(passed) == {shared_gate()}


def raised_by(call):
    """Return the error of `call`, or None.

    A thread makes the call, so that a hang fails the test.
    """
    errors = []

    def work():
        try:
            call()
            errors.append(None)
        except BaseException as e:
            errors.append(e)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(60)
    assert errors, "it waits for ever"
    return errors[0]


@pytest.mark.parametrize(
    "kind", [SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError, StopIteration]
)
def test_whatever_a_reader_raises_ends_the_wait(kind, monkeypatch):
    reader = SlowReader()
    cache = ExpertCache(reader, 2)
    with monkeypatch.context() as patch:
        patch.setattr(reader, "turn", lambda layer, expert: (_ for _ in ()).throw(kind()))
        assert raised_by(lambda: get(cache, 0, [0, 1])) is not None
        assert raised_by(lambda: list(cache.stream(0, [0, 1, 2], (), ascending=True))) is not None
    assert get(cache, 0, [0, 1]) == {0: 0, 1: 1}


def test_a_reading_thread_that_dies_ends_the_wait_and_is_replaced(monkeypatch):
    cache = ExpertCache(SlowReader(), 2)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)

    def dies(self, job):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(fetcher.Fetcher, "_run", dies)
        assert "has died" in str(raised_by(lambda: get(cache, 0, [0, 1])))
    assert get(cache, 0, [0, 1]) == {0: 0, 1: 1}


def test_a_closed_cache_says_so_to_those_who_wait_and_those_who_come():
    reader = SlowReader(held=True)
    cache = ExpertCache(reader, 3)
    waiting = []
    thread = threading.Thread(
        target=lambda: waiting.append(raised_by(lambda: get(cache, 0, [0, 1, 2])))
    )
    thread.start()
    for expert in (0, 1):
        reader.wait_until_asked(0, expert)
    closing = threading.Thread(target=cache.close)
    closing.start()
    while not inside(inside(cache, "state").fetcher, "closed"):
        pass
    for expert in (0, 1):
        reader.let(0, expert)
    thread.join(60)
    closing.join(60)
    assert "closed" in str(waiting[0])
    assert "closed" in str(raised_by(lambda: get(cache, 0, [4, 5])))
    assert reader.closed


def test_experts_of_a_thread_that_died_in_a_lease_are_free_again():
    cache = ExpertCache(SlowReader(), 0, staging=2)
    leases = []

    def work():
        lease = cache.lease(0, [0, 1])
        leases.append(lease)
        lease.__enter__().all()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert raised_by(lambda: get(cache, 0, [2, 3])) is None


STUCK = """
import threading
import loader.experts.fetcher
from loader.experts.cache import ExpertCache
from slow_reader import SlowReader
loader.experts.fetcher.CLOSE_WAIT_S = 0.1
reader = SlowReader(held=True)
cache = ExpertCache(reader, 3)
def ask():
    with cache.lease(0, [0, 1, 2]) as lease:
        lease.all()
threading.Thread(target=ask, daemon=True).start()
reader.wait_until_asked(0, 1)
"""


def test_a_process_that_ends_while_experts_are_read_ends_without_a_traceback():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(SEARCH_PATH)}
    done = subprocess.run(
        [sys.executable, "-c", STUCK], env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
