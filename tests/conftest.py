"""Devices, dtypes and seeds of all tests; what they share stands in util.py."""

import pytest
import torch
from hypothesis import HealthCheck, settings
from util import DTYPES

import regfast

DEVICES = ["cpu"]
if regfast.build_info().get("cuda") and torch.cuda.is_available():
    DEVICES.append("cuda")

# Examples are few and the same on every run: the suite is a gate, not a search.
settings.register_profile(
    "regfast",
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("regfast")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.fixture
def threads():
    """Gives back the number of threads that a test changes."""
    count = torch.get_num_threads()
    yield count
    torch.set_num_threads(count)
