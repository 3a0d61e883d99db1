import threading

import pytest
import torch
from transformers import AutoModelForCausalLM

from formats.artifact import Artifact
from formats.errors import DamageError
from formats.reader import READERS
from loader.cache import ExpertCache
from loader.model import load_tokenizer
from loader.perplexity import read_text, windows_of
from loader.policy import POLICIES, LruPolicy
from loader.stats import LayerStats


class CountingReader:
    """Gives one byte, the expert's number, and notes what was asked for."""

    def __init__(self):
        self.asked = []
        self.fails = False

    def read(self, layer, expert):
        if self.fails:
            raise DamageError("cut")
        self.asked.append((layer, expert))
        return torch.tensor([expert], dtype=torch.uint8)


@pytest.fixture
def artifact(converted):
    return Artifact.open(converted("2bit"))


def cache_of(artifact, slots, reader=None):
    return ExpertCache(artifact, reader or CountingReader(), slots)


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


def test_hits_are_counted_before_the_two_are_put_in(artifact):
    cache = cache_of(artifact, 2)
    hits = []
    # Contents by hand, most recent last: 0 1 | 1 0 | 2 1 (1 is a hit though 2 makes room) | 3 2 | 0 1 | 1 0
    for experts in ([0, 1], [1, 0], [2, 1], [3, 2], [0, 1], [1, 0]):
        before = cache.stats().layers[0].hits
        cache.get(0, experts)
        hits.append(cache.stats().layers[0].hits - before)
    assert hits == [0, 2, 1, 1, 0, 2]


def test_the_second_ranked_is_the_most_recently_used(artifact):
    reader = CountingReader()
    cache = cache_of(artifact, 3, reader)
    cache.get(0, [5, 3])
    cache.get(0, [1, 2])  # 5 goes: 3 was the more recent of the two
    reader.asked.clear()
    cache.get(0, [3, 5])
    assert reader.asked == [(0, 5)]


def test_layers_do_not_share_slots(artifact):
    reader = CountingReader()
    cache = cache_of(artifact, 2, reader)
    for layer in range(8):
        cache.get(layer, [0, 1])
    for layer in range(8):
        cache.get(layer, [0, 1])
    assert len(reader.asked) == 16
    assert all(s == LayerStats(2, 2, 0, 2 * artifact.entry(0, 0).length) for s in cache.stats().layers)


def test_counters_add_up(artifact):
    reader = CountingReader()
    cache = cache_of(artifact, 3, reader)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        cache.get(1, torch.randperm(8, generator=generator)[:2].tolist())
    total = cache.stats().total
    assert total.hits + total.misses == 400
    assert total.misses == len(reader.asked)
    assert total.evictions == total.misses - 3
    assert total.bytes_read == total.misses * artifact.entry(1, 0).length
    cache.reset_stats()
    assert cache.stats().total == LayerStats()


def test_a_random_replay_gives_the_ratio_of_a_plain_recency_list(artifact):
    generator = torch.Generator().manual_seed(1)
    asked = [torch.randperm(8, generator=generator)[:2].tolist() for _ in range(300)]
    for slots in range(2, 9):
        cache = cache_of(artifact, slots)
        for experts in asked:
            cache.get(0, experts)
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
    """Layer -> [tokens, 2]: the experts of the example model on windows of English text, in reading order."""
    model = AutoModelForCausalLM.from_pretrained(example_folder, dtype="auto")
    asked = [[] for _ in model.model.layers]
    for layer, experts in zip(model.model.layers, asked, strict=True):
        layer.mlp.gate.register_forward_hook(lambda module, x, result, experts=experts: experts.append(result[2]))
    text = read_text(example_folder.parent / "text" / "english.txt")
    with torch.inference_mode():
        for window in windows_of(load_tokenizer(example_folder), text, 256, 8):
            model(input_ids=window[None], use_cache=False)
    return [torch.cat(experts).tolist() for experts in asked]


@pytest.mark.parametrize(("slots", "readme"), [(2, 0.46), (3, 0.588), (4, 0.707), (6, 0.895)])
def test_hit_ratio_on_text_is_the_readmes(artifact, routes, slots, readme):
    cache = cache_of(artifact, slots)
    for layer, asked in enumerate(routes):
        for experts in asked:
            cache.get(layer, experts)
    layers = cache.stats().layers
    assert [s.hits for s in layers] == [recency_list_hits(asked, slots) for asked in routes]
    # The README's ratios are means over 48 windows; these are 8 of them.
    assert sum(s.hit_ratio for s in layers) / 8 == pytest.approx(readme, abs=0.03)


def test_more_than_the_slots_at_once_is_an_error(artifact):
    cache = cache_of(artifact, 2)
    with pytest.raises(ValueError, match="2 slots"):
        cache.get(0, [0, 1, 2])
    with pytest.raises(ValueError):
        cache.get(0, [1, 1])


def test_a_failed_read_leaves_the_cache_usable(artifact):
    reader = CountingReader()
    cache = cache_of(artifact, 2, reader)
    cache.get(0, [0, 1])
    reader.fails = True
    with pytest.raises(DamageError):
        cache.get(0, [2, 3])
    reader.fails = False
    for experts in ([2, 3], [4, 5], [0, 1]):
        assert {e: int(b[0]) for e, b in cache.get(0, experts).items()} == {e: e for e in experts}


def test_cleared_slots_are_read_again(artifact):
    reader = CountingReader()
    cache = cache_of(artifact, 2, reader)
    cache.get(0, [0, 1])
    cache.clear()
    cache.get(0, [0, 1])
    assert len(reader.asked) == 4


@pytest.mark.parametrize("io", READERS)
def test_bytes_are_those_of_the_file_after_evictions(artifact, io):
    with READERS[io](artifact) as reader:
        cache = ExpertCache(artifact, reader, 2, keep_views=io != "mmap")
        for experts in ([0, 1], [2, 3], [0, 7]):
            for expert, blob in cache.get(4, experts).items():
                entry = artifact.entry(4, expert)
                with open(artifact.layer_path(4), "rb") as f:
                    f.seek(entry.offset)
                    assert blob.numpy().tobytes() == f.read(entry.length)


def test_a_map_is_not_copied_where_everything_fits(artifact):
    with READERS["mmap"](artifact) as reader:
        cache = ExpertCache(artifact, reader, 8)
        blob = cache.get(0, [3])[3]
        assert blob.data_ptr() == reader.read(0, 3).data_ptr()
        assert cache.stats().total == LayerStats(0, 1, 0, artifact.entry(0, 3).length)


def test_a_slot_over_a_map_is_memory_of_its_own_where_not_all_fit(artifact):
    with READERS["mmap"](artifact) as reader:
        blob = ExpertCache(artifact, reader, 2, keep_views=False).get(0, [3])[3]
        assert blob.data_ptr() != reader.read(0, 3).data_ptr()


def test_threads_get_the_right_bytes_from_a_small_cache(artifact):
    cache = cache_of(artifact, 2)
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(500):
            experts = torch.randperm(8, generator=generator)[:2].tolist()
            blobs = cache.get(0, experts)
            wrong.extend(e for e in experts if int(blobs[e][0]) != e)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cache.stats().total.hits + cache.stats().total.misses == 4000
