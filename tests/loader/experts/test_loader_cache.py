import threading
from types import SimpleNamespace

import pytest
import torch
from inside import inside
from slow_reader import EXPERT_BYTES, SlowReader
from transformers import AutoModelForCausalLM

from formats.artifact import Artifact
from formats.errors import DamageError
from formats.reading.readers import READERS
from loader.evaluation.perplexity import read_text, windows_of
from loader.experts.cache import ExpertCache
from loader.experts.policy import POLICIES, LruPolicy
from loader.experts.stats import LayerStats
from loader.model import load_tokenizer


def get(cache, layer, experts):
    """The first byte of each expert, by a lease."""
    with cache.lease(layer, experts) as lease:
        return {expert: int(blob[0]) for expert, blob in lease.all().items()}


@pytest.fixture
def artifact(converted):
    return Artifact.open(converted("2bit"))


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_policy_never_gives_up_what_is_pinned(policy):
    order = policy()
    for expert in (0, 1, 2, 3):
        order.touch(expert)
    assert {order.victim((1, 3)), order.victim((1, 3))} == {0, 2}


def test_lru_gives_up_the_least_recently_used():
    order = LruPolicy()
    for expert in (0, 1, 2, 0):
        order.touch(expert)
    assert [order.victim(()) for _ in range(3)] == [1, 2, 0]


def test_hits_are_counted_before_the_two_are_put_in():
    cache = ExpertCache(SlowReader(), 2, policy=LruPolicy)
    hits = []
    # Contents by hand, most recent last: 0 1 | 1 0 | 2 1 (1 is a hit though 2 makes room) | 3 2 | 0
    # 1 | 1 0
    for experts in ([0, 1], [1, 0], [2, 1], [3, 2], [0, 1], [1, 0]):
        before = cache.stats().layers[0].hits
        get(cache, 0, experts)
        hits.append(cache.stats().layers[0].hits - before)
    assert hits == [0, 2, 1, 1, 0, 2]


def test_the_second_ranked_is_the_most_recently_used():
    reader = SlowReader()
    cache = ExpertCache(reader, 3, policy=LruPolicy)
    get(cache, 0, [5, 3])
    get(cache, 0, [1, 2])  # 5 goes: 3 was the more recent of the two
    reader.asked.clear()
    get(cache, 0, [3, 5])
    assert reader.asked == [(0, 5)]


def test_layers_do_not_share_slots():
    reader = SlowReader()
    cache = ExpertCache(reader, 2, policy=LruPolicy)
    for layer in range(8):
        get(cache, layer, [0, 1])
    for layer in range(8):
        get(cache, layer, [0, 1])
    assert len(reader.asked) == 16
    assert all(s == LayerStats(2, 2, 0, 2 * EXPERT_BYTES) for s in cache.stats().layers)


def test_counters_add_up():
    reader = SlowReader()
    cache = ExpertCache(reader, 3, policy=LruPolicy)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        get(cache, 1, torch.randperm(8, generator=generator)[:2].tolist())
    total = cache.stats().total
    assert total.hits + total.misses == 400
    assert total.misses == len(reader.asked)
    assert total.evictions == total.misses - 3
    assert total.bytes_read == total.misses * EXPERT_BYTES
    cache.reset_stats()
    assert cache.stats().total == LayerStats()


def test_a_random_replay_gives_the_ratio_of_a_plain_recency_list():
    generator = torch.Generator().manual_seed(1)
    asked = [torch.randperm(8, generator=generator)[:2].tolist() for _ in range(300)]
    for slots in range(2, 9):
        cache = ExpertCache(SlowReader(), slots, policy=LruPolicy)
        for experts in asked:
            get(cache, 0, experts)
        assert cache.stats().layers[0].hits == recency_list_hits(asked, slots)


def recency_list_hits(asked, slots):
    """The protocol of examples/tiny-mixtral/README.md, written down independently."""
    recent, hits = [], 0
    for experts in asked:
        hits += sum(e in recent[-slots:] for e in experts)
        for e in experts:
            recent = [r for r in recent if r != e] + [e]
    return hits


@pytest.fixture(scope="module")
def routes(example_folder):
    """Layer -> [tokens, 2]: the experts of the example model on windows of English text, in reading
    order.
    """
    model = AutoModelForCausalLM.from_pretrained(example_folder, dtype="auto")
    asked = [[] for _ in model.model.layers]
    for layer, experts in zip(model.model.layers, asked, strict=True):
        layer.mlp.gate.register_forward_hook(
            lambda module, x, result, experts=experts: experts.append(result[2])
        )
    text = read_text(example_folder.parent / "text" / "english.txt")
    with torch.inference_mode():
        for window in windows_of(load_tokenizer(example_folder), text, 256, 8):
            model(input_ids=window[None], use_cache=False)
    return [torch.cat(experts).tolist() for experts in asked]


@pytest.mark.parametrize(("slots", "readme"), [(2, 0.46), (3, 0.588), (4, 0.707), (6, 0.895)])
def test_hit_ratio_on_text_is_the_readmes(routes, slots, readme):
    cache = ExpertCache(SlowReader(), slots, policy=LruPolicy)
    for layer, asked in enumerate(routes):
        for experts in asked:
            get(cache, layer, experts)
    layers = cache.stats().layers
    assert [s.hits for s in layers] == [recency_list_hits(asked, slots) for asked in routes]
    # The README's ratios are means over 48 windows; these are 8 of them.
    assert sum(s.hit_ratio for s in layers) / 8 == pytest.approx(readme, abs=0.03)


def test_more_than_have_room_at_once_is_an_error():
    cache = ExpertCache(SlowReader(), 1, staging=2, policy=LruPolicy)
    with pytest.raises(ValueError, match="3 different ones"):
        get(cache, 0, [0, 1, 2, 3])
    with pytest.raises(ValueError):
        get(cache, 0, [1, 1])


@pytest.mark.parametrize("slots", [0, 1])
def test_fewer_slots_than_a_token_uses_are_enough(slots):
    reader = SlowReader()
    cache = ExpertCache(reader, slots, staging=2, policy=LruPolicy)
    for experts in ([0, 1], [2, 3], [3, 0], [4, 5]):
        cache.guess(0, experts[:1])
        assert get(cache, 0, experts) == {e: e for e in experts}
    assert len(reader.buffers) <= 8 * slots + 2
    # With one slot it holds 1, then 3, which is a hit.
    assert cache.stats().total.hits == slots


def test_layers_may_have_different_numbers_of_slots():
    reader = SlowReader(layers=2)
    cache = ExpertCache(reader, [2, 4])
    for layer in (0, 1):
        for experts in ([0, 1], [2, 3], [0, 1]):
            get(cache, layer, experts)
    assert [layer.hits for layer in cache.stats().layers] == [0, 2]


def test_a_failed_read_leaves_the_cache_usable():
    reader = SlowReader()
    cache = ExpertCache(reader, 2, policy=LruPolicy)
    get(cache, 0, [0, 1])
    reader.fails = {(0, 3)}
    with pytest.raises(DamageError, match="expert 3"):
        get(cache, 0, [2, 3])
    reader.fails = set()
    for experts in ([2, 3], [4, 5], [0, 1]):
        assert get(cache, 0, experts) == {e: e for e in experts}


def test_a_failed_read_with_fewer_slots_than_experts_is_raised_as_it_is():
    reader = SlowReader()
    cache = ExpertCache(reader, 1, policy=LruPolicy)
    get(cache, 0, [0, 1])
    reader.fails = {(0, 3)}
    with pytest.raises(DamageError, match="expert 3"):
        get(cache, 0, [2, 3])
    reader.fails = set()
    assert get(cache, 0, [2, 3]) == {2: 2, 3: 3}


def test_buffers_are_no_more_than_slots_and_those_aside():
    reader = SlowReader()
    cache = ExpertCache(reader, 2, staging=2, policy=LruPolicy)
    generator = torch.Generator().manual_seed(0)
    for step in range(300):
        layer = step % 8
        with cache.lease(layer, torch.randperm(8, generator=generator)[:2].tolist()) as lease:
            cache.guess((layer + 1) % 8, torch.randperm(8, generator=generator)[:2].tolist())
            assert {e: int(b[0]) for e, b in lease.all().items()} == {e: e for e in lease.all()}
    assert len(reader.buffers) <= 8 * 2 + 2


def test_what_is_there_is_ready_while_the_rest_is_read():
    reader = SlowReader(held=True)
    cache = ExpertCache(reader, 3, policy=LruPolicy)
    reader.let(0, 0)
    get(cache, 0, [0])
    with cache.lease(0, [1, 0]) as lease:
        assert list(lease.ready) == [0]
        parts = lease.parts()
        assert list(next(parts)) == [0]
        reader.let(0, 1)
        assert [list(part) for part in parts] == [[1]]
        assert list(lease.all()) == [1, 0]


def test_two_missing_experts_are_read_together_and_come_as_they_arrive():
    reader = SlowReader(held=True)
    cache = ExpertCache(reader, 2, policy=LruPolicy)
    with cache.lease(0, [0, 1]) as lease:
        reader.wait_until_asked(0, 0)
        reader.wait_until_asked(0, 1)
        parts = lease.parts()
        reader.let(0, 1)
        assert list(next(parts)) == [1]
        reader.let(0, 0)
        assert list(next(parts)) == [0]


def test_an_interrupted_lease_leaves_the_cache_usable(monkeypatch):
    reader = SlowReader(held=True)
    cache = ExpertCache(reader, 2, policy=LruPolicy)
    with (
        pytest.raises(KeyboardInterrupt),
        cache.lease(0, [0, 1]) as lease,
        monkeypatch.context() as patch,
    ):
        patch.setattr("loader.experts.lease.time", SimpleNamespace(perf_counter=interrupt))
        lease.all()
    for expert in range(4):
        reader.let(0, expert)
    # What was on its way comes in, and leaves again like any other.
    assert get(cache, 0, [2, 3]) == {2: 2, 3: 3}
    assert get(cache, 0, [0, 1]) == {0: 0, 1: 1}


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_forgotten_cache_ends_its_threads_and_closes_its_files():
    reader = SlowReader()
    cache = ExpertCache(reader, 2, policy=LruPolicy)
    get(cache, 0, [0, 1])
    threads = inside(inside(cache, "state").fetcher, "threads")
    assert all(thread.is_alive() for thread in threads)
    del cache
    assert not any(thread.is_alive() for thread in threads)
    assert reader.closed


@pytest.mark.parametrize("slots", [2, 8])
@pytest.mark.parametrize("io", READERS)
def test_bytes_are_those_of_the_file_after_evictions(artifact, io, slots):
    cache = ExpertCache(READERS[io](artifact), slots)
    for experts in ([0, 1], [2, 3], [0, 7]):
        with cache.lease(4, experts) as lease:
            for expert, blob in lease.all().items():
                entry = artifact.entry(4, expert)
                with open(artifact.layer_path(4), "rb") as f:
                    f.seek(entry.offset)
                    assert blob.numpy().tobytes() == f.read(entry.length)


@pytest.mark.parametrize("slots", [2, 8])
def test_a_map_is_not_copied(artifact, slots):
    reader = READERS["mmap"](artifact)
    cache = ExpertCache(reader, slots, policy=LruPolicy)
    with cache.lease(0, [3]) as lease:
        assert lease.all()[3].data_ptr() == reader.read(0, 3).data_ptr()
    assert cache.stats().total == LayerStats(0, 1, 0, artifact.entry(0, 3).length)


def test_threads_get_the_right_bytes_from_a_small_cache():
    cache = ExpertCache(SlowReader(), 2, policy=LruPolicy)
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(300):
            experts = torch.randperm(8, generator=generator)[: 2 + seed % 3].tolist()
            if len(experts) == 2:
                wrong.extend(e for e, found in get(cache, 0, experts).items() if found != e)
            else:
                for part in cache.stream(0, experts, (), ascending=seed % 2 == 0):
                    wrong.extend(e for e, blob in part.items() if int(blob[0]) != e)
            cache.guess(0, experts[:1])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert not wrong
