"""The checks of gpu_checks.py where there is a GPU and the kernels are on; `make gpu` runs them without pytest."""

import gpu_checks
import pytest

REASON = gpu_checks.enabled()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)


@pytest.mark.parametrize("name", gpu_checks.CHECKS)
def test_on_the_gpu(name):
    try:
        gpu_checks.CHECKS[name](small=False)
    except gpu_checks.Skip as reason:
        pytest.skip(str(reason))
