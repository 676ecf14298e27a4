"""Memory of large results: kept for the next ones, never seen in them, and given back when it is asked for."""

import pickle
import sys
import threading

import pytest
import torch
from util import NAN, SANITIZED, fresh_process

import regfast

pytestmark = [
    pytest.mark.kernels("linear", "softmax", "cross_entropy", "mse_loss", "linear_cross_entropy"),
    pytest.mark.skipif(
        sys.platform != "linux" or SANITIZED, reason="buffers are kept on Linux, and not under make asan"
    ),
]

LARGE = 1024, 1030  # more than 4 MiB of float32, and no multiple of a page


def large(seed=0):
    return regfast.softmax(torch.randn(*LARGE, generator=torch.Generator().manual_seed(seed)))


@pytest.fixture(autouse=True)
def nothing_kept():
    regfast.memory.release()
    yield
    regfast.memory.release()


def test_a_freed_result_gives_its_memory_to_the_next():
    first = large()
    before, address, values = regfast.memory.stats(), first.data_ptr(), first.clone()
    assert before.used_bytes >= first.nbytes
    del first
    freed = regfast.memory.stats()
    assert freed.kept_bytes - before.kept_bytes == before.used_bytes - freed.used_bytes >= values.nbytes
    again = large()
    after = regfast.memory.stats()
    assert again.data_ptr() == address and (after.reused, after.mapped) == (before.reused + 1, before.mapped)
    assert torch.equal(again, values)


def test_what_was_in_a_buffer_is_not_seen_again():
    x, w = torch.randn(*LARGE, requires_grad=True), torch.randn(1100, LARGE[1], requires_grad=True)
    target = torch.randint(1100, LARGE[:1])
    target[::3] = -100

    def results():
        y = regfast.linear(x, w, activation="gelu")
        loss = regfast.cross_entropy(y, target)
        total = loss + regfast.linear_cross_entropy(x, w, target) + regfast.mse_loss(y, torch.ones_like(y)).mean()
        return [y.detach(), total.detach(), *torch.autograd.grad(total, [x, w])]

    fresh = results()
    expected = [r.clone() for r in fresh]
    for _ in range(2):
        for r in fresh:
            r.fill_(NAN)
        del r, fresh
        fresh = results()
        assert all(torch.equal(r, e) for r, e in zip(fresh, expected, strict=True))


def test_a_result_outlives_its_base_and_its_storage_may_change():
    y = large()
    expected = y.clone()
    view, array = y[10:20], y.numpy()
    del y
    other = large(seed=1)
    assert torch.equal(view, expected[10:20]) and (array == expected.numpy()).all()
    storage = other.untyped_storage()
    size = storage.nbytes()
    storage.resize_(2 * size)
    assert torch.equal(other, large(seed=1))
    storage.resize_(0)
    storage.resize_(size)
    other.fill_(1)
    shared = large(seed=2).share_memory_()
    assert shared.is_shared() and torch.equal(shared, large(seed=2))
    assert torch.equal(pickle.loads(pickle.dumps(large())), expected)
    assert torch.equal(large().resize_(10), expected.flatten()[:10])


def test_release_gives_everything_back():
    kept = [large(seed) for seed in range(3)]
    live = kept.pop()
    expected = live.clone()
    kept.clear()
    assert regfast.memory.stats().kept_bytes > 0
    regfast.memory.release()
    assert regfast.memory.stats().kept_bytes == 0
    assert torch.equal(live, expected) and torch.equal(large(2), expected)


def test_threads_take_and_give_back():
    expected = [large(seed) for seed in range(4)]
    wrong = []

    def work(seed):
        for _ in range(20):
            if not torch.equal(large(seed), expected[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


FORK = """
    import os, torch, regfast
    torch.set_num_threads(1)  # torch's pool does not survive a fork
    x = torch.randn(1024, 1030)
    kept, live = regfast.softmax(x), regfast.softmax(x)
    expected = live.clone()
    del kept
    child = os.fork()
    if child == 0:
        again, more = regfast.softmax(x), regfast.softmax(x)
        right = torch.equal(again, expected) and torch.equal(more, expected) and torch.equal(live, expected)
        del live, again, more
        regfast.memory.release()
        os._exit(0 if right else 1)
    status = os.waitpid(child, 0)[1]
    print(status, torch.equal(live, expected), torch.equal(regfast.softmax(x), expected))
"""


@pytest.mark.no_kernels("they run in a process of its own")
def test_a_forked_process_has_buffers_of_its_own():
    assert fresh_process(FORK).split() == ["0", "True", "True"]


LIMIT = """
    import torch, regfast
    def large(rows): return regfast.softmax(torch.randn(rows, 1024))
    print(regfast.memory.stats().limit)
    a, b, c = large(2000), large(4000), large(6000)  # 8, 16 and 24 MB
    del a, b, c
    print(regfast.memory.stats().kept_bytes)
"""


@pytest.mark.no_kernels("they run in a process of its own")
@pytest.mark.parametrize("limit, kept", [(0, 0), (30 << 20, 24 << 20), (64 << 20, 48 << 20), (1 << 20, 0)])
def test_what_is_kept_has_a_limit(limit, kept):
    # Above it, what was given back first goes first: a and b here, in the order in which `del` lets go of them.
    found_limit, found_kept = map(int, fresh_process(LIMIT, REGFAST_POOL=str(limit)).split())
    assert found_limit == limit and 0 <= found_kept - kept < 6 << 20


def test_the_profiler_counts_large_results():
    with torch.profiler.profile(profile_memory=True) as profile:
        y = large()
    assert sum(e.self_cpu_memory_usage for e in profile.events()) >= y.nbytes
