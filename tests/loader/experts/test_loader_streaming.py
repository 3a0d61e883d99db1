from itertools import chain

import pytest
from inside import inside
from slow_reader import SlowReader

from formats.errors import DamageError
from loader.experts.cache import ExpertCache
from loader.experts.policy import LruPolicy


def streamed(cache, layer, experts, ascending=False):
    """The numbers of each part; checks the bytes."""
    parts = []
    for part in cache.stream(layer, experts, (), ascending=ascending):
        assert all(int(blob[0]) == expert for expert, blob in part.items())
        parts.append(list(part))
    return parts


def in_slots(cache, layer):
    return set(inside(cache, "layers")[layer].cached)


@pytest.mark.parametrize("ascending", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8])
def test_each_expert_comes_and_is_read_once(slots, ascending):
    reader = SlowReader()
    cache = ExpertCache(reader, slots, policy=LruPolicy)
    parts = streamed(cache, 0, [5, 2, 7, 0, 1, 6], ascending)
    assert sorted(chain(*parts)) == [0, 1, 2, 5, 6, 7]
    assert sorted(reader.asked) == [(0, e) for e in (0, 1, 2, 5, 6, 7)]
    if ascending:
        assert list(chain(*parts)) == [0, 1, 2, 5, 6, 7]


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
def test_afterwards_the_slots_hold_what_was_used_last(slots):
    cache = ExpertCache(SlowReader(), slots, policy=LruPolicy)
    for experts in ([5, 2, 7, 0, 1, 6], [0, 1, 2, 3, 4, 5], [7, 6, 5, 4, 3, 2]):
        streamed(cache, 0, experts)
        assert in_slots(cache, 0) == set(experts[-slots:])


def test_the_last_used_leave_last():
    reader = SlowReader()
    cache = ExpertCache(reader, 3, policy=LruPolicy)
    streamed(cache, 0, [3, 1, 2, 0])
    with cache.lease(0, [5]) as lease:
        lease.all()
    assert in_slots(cache, 0) == {2, 0, 5}


def test_few_tokens_do_not_empty_the_slots_of_others():
    cache = ExpertCache(SlowReader(), 4, policy=LruPolicy)
    streamed(cache, 0, [0, 1, 2, 3])
    streamed(cache, 0, [4])
    assert in_slots(cache, 0) == {1, 2, 3, 4}


def test_what_is_there_comes_first_and_the_rest_as_it_arrives():
    reader = SlowReader(held=True)
    cache = ExpertCache(reader, 3, policy=LruPolicy)
    reader.let(0, 6)
    assert streamed(cache, 0, [6]) == [[6]]
    parts = cache.stream(0, [0, 1, 6], (), ascending=False)
    assert list(next(parts)) == [6]
    reader.let(0, 1)
    assert list(next(parts)) == [1]
    reader.let(0, 0)
    assert list(next(parts)) == [0]
    assert list(parts) == []


def test_in_ascending_order_nothing_overtakes():
    reader = SlowReader(held=True)
    cache = ExpertCache(reader, 3, policy=LruPolicy)
    reader.let(0, 6)
    streamed(cache, 0, [6])
    parts = cache.stream(0, [0, 1, 6], (), ascending=True)
    for expert in (1, 0):
        reader.let(0, expert)
    assert list(chain(*parts)) == [0, 1, 6]


def test_the_next_one_is_read_while_one_is_computed():
    reader = SlowReader(held=True)
    cache = ExpertCache(reader, 1, staging=2, policy=LruPolicy)
    parts = cache.stream(0, [0, 1, 2, 3], (), ascending=True)
    reader.let(0, 0)
    assert list(next(parts)) == [0]
    reader.wait_until_asked(0, 1)
    for expert in (1, 2, 3):
        reader.let(0, expert)
    assert list(chain(*parts)) == [1, 2, 3]


def test_a_failed_read_is_raised_and_leaves_nothing_pinned():
    reader = SlowReader()
    cache = ExpertCache(reader, 2, policy=LruPolicy)
    reader.fails = {(0, 3)}
    with pytest.raises(DamageError, match="expert 3"):
        streamed(cache, 0, [0, 1, 2, 3, 4])
    reader.fails = set()
    assert sorted(chain(*streamed(cache, 0, [0, 1, 2, 3, 4]))) == [0, 1, 2, 3, 4]
    with cache.lease(0, [6, 7]) as lease:
        assert len(lease.all()) == 2


def test_a_prompt_that_is_given_up_leaves_nothing_pinned():
    cache = ExpertCache(SlowReader(), 2, policy=LruPolicy)
    for _ in range(4):
        parts = cache.stream(0, [0, 1, 2, 3, 4], (), ascending=False)
        next(parts)
        parts.close()
    with cache.lease(0, [6, 7]) as lease:
        assert len(lease.all()) == 2
    assert len(streamed(cache, 1, [0, 1, 2, 3, 4])) >= 1


def test_leftover_guesses_do_not_keep_a_prompt_from_its_room():
    reader = SlowReader()
    cache = ExpertCache(reader, 1, staging=2, policy=LruPolicy)
    cache.guess(5, [0, 1])
    for expert in (0, 1):
        reader.wait_until_asked(5, expert, times=2)
    assert sorted(chain(*streamed(cache, 0, [0, 1, 2, 3]))) == [0, 1, 2, 3]


def test_an_interrupt_while_an_expert_gets_its_slot_loses_no_buffer():
    class InterruptedPolicy(LruPolicy):
        """Raises KeyboardInterrupt when an expert must leave, once."""

        is_interrupted = False

        def victim(self, fixed):
            if self.is_interrupted:
                self.is_interrupted = False
                raise KeyboardInterrupt
            return super().victim(fixed)

    policy = InterruptedPolicy()
    reader = SlowReader(layers=1, held=True)
    cache = ExpertCache(reader, 1, staging=1, policy=lambda: policy)
    reader.let(0, 0)
    with cache.lease(0, [0]) as lease:
        lease.all()
    cache.guess(0, [2])
    reader.wait_until_asked(0, 2)
    policy.is_interrupted = True
    with pytest.raises(KeyboardInterrupt), cache.lease(0, [2]):
        pass
    # The read is still under way, and its buffer is not free.
    cache.guess(0, [3])
    for expert in (2, 3, 4):
        reader.let(0, expert)
    assert sorted(chain(*streamed(cache, 0, [3, 4]))) == [3, 4]
