import pytest
import torch
from inside import inside
from slow_reader import EXPERT_BYTES, SlowReader

from formats.reading.reader import STEP_BYTES
from loader.experts.cache import ExpertCache
from loader.experts.prefetch import REST_TOKENS, TRIAL_GUESSES, Prefetcher, in_order, ranked
from loader.experts.stats import LayerStats

HALF = EXPERT_BYTES // 2


def get(cache, layer, experts):
    with cache.lease(layer, experts) as lease:
        return {expert: int(blob[0]) for expert, blob in lease.all().items()}


def settle(cache, layer, *experts):
    """Waits until the guesses have been read."""
    staged = inside(cache, "layers")[layer].staged
    inside(cache, "monitor").wait_for(
        lambda: all(e in staged and not staged[e].job for e in experts) or None, timeout_s=60
    )


def test_a_right_guess_is_not_read_again():
    reader = SlowReader()
    cache = ExpertCache(reader, 2)
    cache.guess(1, [4])
    settle(cache, 1, 4)
    assert get(cache, 1, [4, 5]) == {4: 4, 5: 5}
    assert reader.asked.count((1, 4)) == 2
    stats = cache.stats().layers[1]
    assert (stats.hits, stats.misses, stats.guesses, stats.useful_guesses) == (0, 2, 1, 1)
    assert (stats.bytes_read, stats.wasted_bytes) == (2 * EXPERT_BYTES, 0)


def test_a_guess_that_is_under_way_goes_on_on_demand():
    reader = SlowReader(held=True)
    cache = ExpertCache(reader, 2)
    cache.guess(1, [4])
    reader.let(1, 4, steps=1)
    reader.wait_until_asked(1, 4, times=2)
    with cache.lease(1, [4]) as lease:
        assert not lease.ready
        reader.let(1, 4, steps=1)
        assert int(lease.all()[4][0]) == 4
    stats = cache.stats().layers[1]
    assert (stats.useful_guesses, stats.early_bytes, stats.wasted_bytes) == (1, HALF, 0)


def test_a_wrong_guess_is_dropped_and_counted():
    reader = SlowReader()
    cache = ExpertCache(reader, 2)
    cache.guess(1, [4])
    settle(cache, 1, 4)
    assert get(cache, 1, [5, 6]) == {5: 5, 6: 6}
    stats = cache.stats().layers[1]
    assert (stats.guesses, stats.useful_guesses, stats.wasted_bytes) == (1, 0, EXPERT_BYTES)
    assert stats.recall == 0.0
    get(cache, 1, [4])
    assert reader.asked.count((1, 4)) == 3


def test_a_guess_evicts_nothing():
    reader = SlowReader()
    cache = ExpertCache(reader, 2)
    get(cache, 1, [0, 1])
    cache.guess(1, [4, 5])
    settle(cache, 1, 5)
    assert get(cache, 1, [0, 1]) == {0: 0, 1: 1}
    assert cache.stats().layers[1].hits == 2


def test_guesses_are_read_one_by_one_and_no_more_than_there_is_room_for():
    reader = SlowReader(held=True)
    cache = ExpertCache(reader, 2, staging=2)
    cache.guess(1, [4, 5, 6])
    reader.wait_until_asked(1, 4)
    assert (1, 5) not in reader.asked
    reader.let(1, 4)
    reader.let(1, 5)
    settle(cache, 1, 5)
    assert cache.stats().layers[1].guesses == 2


def test_a_demand_overtakes_a_guess():
    reader = SlowReader(held=True)
    cache = ExpertCache(reader, 2)
    cache.guess(2, [4])
    reader.wait_until_asked(2, 4)
    with cache.lease(1, [0]) as lease:
        # The guess has had its piece; its second one must wait for the demand.
        reader.let(2, 4, steps=2)
        reader.wait_until_asked(1, 0)
        assert reader.asked.count((2, 4)) == 1
        reader.let(1, 0)
        assert int(lease.all()[0][0]) == 0
    settle(cache, 2, 4)
    assert cache.stats().layers[1].delays == 1


def test_no_guess_begins_while_a_demand_is_read():
    reader = SlowReader(held=True)
    cache = ExpertCache(reader, 2)
    with cache.lease(1, [0]) as lease:
        reader.wait_until_asked(1, 0)
        cache.guess(2, [4])
        assert (2, 4) not in reader.asked
        reader.let(1, 0)
        lease.all()
    reader.wait_until_asked(2, 4)
    reader.let(2, 4)


def test_guesses_for_another_layer_make_room_for_newer_ones():
    reader = SlowReader()
    cache = ExpertCache(reader, 2, staging=2)
    cache.guess(5, [0, 1])
    settle(cache, 5, 1)
    cache.guess(2, [6, 7])
    settle(cache, 2, 7)
    assert get(cache, 2, [6, 7]) == {6: 6, 7: 7}
    assert cache.stats().layers[2].useful_guesses == 2


def test_a_failed_guess_is_nobodys_error():
    reader = SlowReader()
    cache = ExpertCache(reader, 2)
    reader.fails = {(1, 4)}
    cache.guess(1, [4, 5])
    settle(cache, 1, 5)
    assert 4 not in inside(cache, "layers")[1].staged
    reader.fails = set()
    assert get(cache, 1, [4, 5]) == {4: 4, 5: 5}


def prefetcher(guesses=2, layers=3):
    torch.manual_seed(0)
    routers = [torch.randn(8, 16) for _ in range(layers)]
    norms = [torch.rand(16) + 0.5 for _ in range(layers)]
    return Prefetcher(routers, norms, guesses), routers, norms


def test_guess_is_the_next_router_over_the_next_norm():
    guesser, routers, norms = prefetcher()
    normed = torch.randn(1, 16)
    expected = (routers[2] @ (normed[0] * norms[2])).topk(2).indices.tolist()
    assert in_order(ranked(guesser.router(1), normed * norms[1], 2)) == expected


def test_many_tokens_guess_what_most_of_them_need():
    guesser, routers, norms = prefetcher()
    normed = torch.randn(5, 16)
    votes = torch.bincount(
        ((normed * norms[1]) @ routers[1].T).topk(2).indices.flatten(), minlength=8
    )
    guesses = in_order(ranked(guesser.router(0), normed * norms[0], 2))
    assert sorted(guesses) == votes.nonzero().flatten().tolist()
    assert [int(votes[e]) for e in guesses] == sorted(votes[votes > 0].tolist(), reverse=True)


def test_a_weight_of_zero_in_the_norm_is_no_infinity():
    torch.manual_seed(0)
    routers, norms = [torch.randn(8, 4)] * 2, [torch.tensor([0.0, 1, 1, 1]), torch.ones(4)]
    x = torch.randn(1, 4) * norms[0]
    expected = (routers[1] @ x[0]).topk(2).indices.tolist()
    assert in_order(ranked(Prefetcher(routers, norms, 2).router(0), x, 2)) == expected


@pytest.mark.parametrize(
    ("early", "delays", "rests"),
    [
        (STEP_BYTES * 50, 10, False),
        (STEP_BYTES * 4, 10, True),
        (0, 0, True),
        (STEP_BYTES, 0, False),
    ],
)
def test_a_layer_rests_where_the_loss_is_the_greater_one(early, delays, rests):
    guesser = prefetcher()[0]
    none = LayerStats()
    guesser.weigh([none, none, LayerStats(guesses=TRIAL_GUESSES - 1, early_bytes=0, delays=1000)])
    assert guesser.router(1) is not None
    guesser.weigh([none, none, LayerStats(guesses=TRIAL_GUESSES, early_bytes=early, delays=delays)])
    assert (guesser.router(1) is None) == rests
    assert guesser.router(0) is not None
    for _ in range(REST_TOKENS - 1):
        guesser.router(1)
    assert guesser.router(1) is not None


def test_counters_that_were_reset_begin_a_new_trial():
    guesser = prefetcher()[0]
    guesser.weigh(
        [LayerStats(), LayerStats(guesses=10 * TRIAL_GUESSES, early_bytes=10**9), LayerStats()]
    )
    guesser.weigh([LayerStats()] * 3)
    assert guesser.router(0) is not None
