import pytest
from inside import inside
from pattern_reader import EXPERT_BYTES, GpuCache

from loader.cuda.experts import cpu_share
from loader.cuda.experts.cpu_share import CpuShare, Speeds

LINK, CPU = Speeds(3e9, 1e9), Speeds(1e9, 3e9)


@pytest.mark.parametrize(
    ("speeds", "copied", "computed"),
    [
        # The link takes 1, 2, 3 thirds for its first three. The fourth takes it 4 thirds, and
        # the CPU 3.
        (LINK, [5, 2, 7], [4]),
        (CPU, [4], [5, 2, 7]),
        (Speeds(1e9, 1e9), [5, 7], [2, 4]),
        (Speeds(1e9, 1.0), [5, 2, 7, 4], []),
    ],
)
def test_each_expert_goes_where_it_is_done_sooner(speeds, copied, computed):
    order = [5, 2, 7, 4] if speeds != CPU else [5, 2, 4, 7]
    found = speeds.split(order, EXPERT_BYTES)
    assert (sorted(found[0]), sorted(found[1])) == (sorted(copied), sorted(computed))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("ratio", [0.1, 0.6, 1.0, 1.7, 4.0])
def test_no_other_split_is_done_sooner(count, ratio):
    speeds = Speeds(ratio, 1.0)
    copied, computed = speeds.split(range(count), 1)
    assert sorted([*copied, *computed]) == list(range(count))
    best = min(max(n / ratio, count - n) for n in range(count + 1))
    assert max(len(copied) / ratio, len(computed)) == pytest.approx(best)


def test_the_order_of_ranks_stays():
    copied, computed = Speeds(1.0, 1.0).split([6, 1, 5, 0], 1)
    assert (copied, computed) == ([6, 5], [1, 0])


def test_speeds_are_those_of_the_link_and_of_memory(monkeypatch):
    monkeypatch.setattr(cpu_share, "link_bytes_per_s", lambda device, n_bytes: (device, n_bytes))
    monkeypatch.setattr(cpu_share.machine, "memory_bytes_per_s", lambda: 7.0)
    assert Speeds.measured("gpu", 100) == Speeds(("gpu", 100), 7.0)


def shared(speeds, **options):
    gpu = GpuCache(2, **options)
    for key in inside(gpu.reader, "patterns"):
        with gpu.tier.use(*key) as use:
            use.step()
    return gpu, CpuShare(gpu.cache, gpu.tier, speeds)


def filled(gpu, layer, expert):
    inside(gpu.cache, "monitor").wait_for(
        lambda: expert in inside(gpu.cache, "layers")[layer].cached or None, timeout_s=60
    )


def test_what_the_slots_have_stays_on_the_gpu():
    gpu, share = shared(CPU)
    gpu.token(0, [0, 1])
    with share.split(0, [1, 0]) as split:
        assert (split.on_gpu, split.on_cpu) == ([1, 0], {})


def test_the_cpu_gets_the_bytes_in_ram_and_the_expert_comes_into_a_slot_afterwards():
    gpu, share = shared(CPU)
    gpu.token(0, [0, 1])
    with share.split(0, [5, 0]) as split, gpu.cache.lease(0, split.on_gpu) as lease:
        assert split.on_gpu == [0]
        assert split.on_cpu[5].equal(inside(gpu.reader, "patterns")[0, 5])
        gpu.use(0, lease.all())
    filled(gpu, 0, 5)
    gpu.token(0, [5])
    assert gpu.cache.stats().total.cpu_experts == 1
    assert gpu.cache.stats().as_dict()["cpu_experts"] == 1
    gpu.check_counts()


def test_a_token_may_go_to_the_cpu_altogether():
    gpu, share = shared(Speeds(1.0, 100.0))
    with share.split(0, [5, 4]) as split, gpu.cache.lease(0, split.on_gpu) as lease:
        assert (split.on_gpu, list(split.on_cpu), lease.all()) == ([], [5, 4], {})
    filled(gpu, 0, 5)
    gpu.check_counts()


def test_what_is_not_in_ram_is_copied():
    gpu = GpuCache(2, ram=4)
    with CpuShare(gpu.cache, gpu.tier, CPU).split(0, [5, 4]) as split:
        assert (split.on_gpu, split.on_cpu) == ([5, 4], {})


def test_a_demand_finds_a_buffer_beside_what_the_cpu_holds():
    gpu, share = shared(Speeds(1.0, 2.0), ram=3, layers=2)
    for expert in (0, 1):
        with gpu.tier.use(0, expert) as use:
            use.step()
    with share.split(0, [0, 1, 7]) as split, gpu.cache.lease(0, split.on_gpu) as lease:
        assert list(split.on_cpu) == [0]
        for blobs in lease.parts():
            gpu.use(0, blobs)
    gpu.check_counts()


def test_an_error_in_between_leaves_nothing_in_use():
    gpu, share = shared(CPU)
    with pytest.raises(KeyboardInterrupt), share.split(0, [5, 0]):
        raise KeyboardInterrupt
    assert gpu.cache.missing(0, [5]) == [5]
    gpu.check_counts()
