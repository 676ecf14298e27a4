"""Devices, dtypes and seeds of all tests; what they share stands in util.py."""

import os
from contextlib import contextmanager

import pytest

# Threads that wait by spinning, one set for each of pytest's processes, take the cores from those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded
# Products are ours on every CPU, where ATen's would be compared with ATen's; the choice has tests of its own.
os.environ.setdefault("REGFAST_GEMM", "own")

import torch
from emulated_gpu import enable, load_emulator
from hypothesis import HealthCheck, settings
from ranks import Ranks
from util import DTYPES, Pool

import regfast
from regfast import _C
from regfast._paths import recorded

EMULATOR = load_emulator()

# The CUDA kernels on the CPU. Tensors are CPU tensors; the threads run in this order, as if on this architecture.
EMULATED = ["cuda_on_host-forward-80", "cuda_on_host-reverse-90", "cuda_on_host-shuffled-90"] if EMULATOR else []
CUDA = ["cuda"] if regfast.build_info()["cuda"] and torch.cuda.is_available() else []

# Examples are few and the same on every run: the suite is a gate, not a search.
settings.register_profile(
    "regfast",
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("regfast")


# The path is asserted: a value test that passes by the composite, or by ATen's product, says nothing of our kernels. In
# a module that is marked with `kernels`, each test has to run kernels of the ops named there, and nothing else, unless
# it is marked in turn: `composite` has the reasons, or parts of them, for which it may take that, `no_kernels` why
# it runs none.


def wrong_path(item, calls):
    """What is wrong with the calls that a test made, or None."""
    ops = tuple(op for mark in item.iter_markers("kernels") for op in mark.args)
    if not ops or next(item.iter_markers("no_kernels"), None):
        return None
    reasons = tuple(reason for mark in item.iter_markers("composite") for reason in mark.args)
    for call in calls:
        if call.path == "composite" and not any(reason in call.why for reason in reasons):
            return f"{call.op}({call.tensors}) took the composite: {call.why}"
        # On CUDA, some products are ATen's by design; regfast.proof and the emulator's tests know which.
        if call.path == "aten" and call.by in regfast.isas():
            return f"{call.op}({call.tensors}): {call.why}"
    if not any(call.op.startswith(ops) for call in calls) and not (reasons and calls):
        return f"no kernels of {' or '.join(ops)} have run"
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    if not next(item.iter_markers("kernels"), None):
        return (yield)
    with recorded(_C, *([EMULATOR] if EMULATOR else [])) as calls:
        result = yield
    if wrong := wrong_path(item, calls):
        pytest.fail(wrong, pytrace=False)
    return result


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@contextmanager
def kernels_of(name):
    """Runs the kernels of a device for as long as it lasts; where its tensors live."""
    if name not in EMULATED:
        yield name
        return
    _, schedule, arch = name.split("-")
    with pytest.MonkeyPatch.context() as patch:
        # ATen's product would leave ours untested. What Hopper's does not take, or another device, is gemm_sm80's.
        patch.setenv("REGFAST_CUDA_GEMM", "sm90")
        enable(EMULATOR, schedule, int(arch))
        try:
            yield "cpu"
        finally:
            EMULATOR.disable()


@pytest.fixture(params=["cpu", *CUDA, *EMULATED])
def device(request):
    with kernels_of(request.param) as place:
        yield place


@pytest.fixture(params=[*CUDA, *EMULATED[-1:]])
def cuda_device(request):
    """For what surrounds the CUDA kernels: one order of the threads is enough."""
    with kernels_of(request.param) as place:
        yield place


@pytest.fixture(params=["cpu", *EMULATED[-1:]])
def kernels(request):
    """For tests that make CPU tensors and nothing else: whose kernels they meet.

    They are about layouts, options, edges and messages, which no order of the threads changes: one order is enough. The
    values that `device` meets, and the kernels' own tests in C++, run in every order.
    """
    with kernels_of(request.param):
        yield request.param


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.fixture
def pool(dtype):
    """Collects the errors of a test's many small tensors, and judges them when it has ended."""
    collected = Pool(dtype)
    yield collected
    collected.check()


@pytest.fixture
def threads():
    """Gives back the number of threads that a test changes."""
    count = torch.get_num_threads()
    yield count
    torch.set_num_threads(count)


@pytest.fixture(scope="session")
def ranks():
    """Four processes of one group, for all tests of one of pytest's processes."""
    processes = Ranks()
    yield processes
    processes.close()
