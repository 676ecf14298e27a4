"""The linear layer over a grid of rows and layers: forward, GELU forward with backward, half types."""

import harness
import pytest
import shapes
import torch
from bench_linear import case
from harness import Case
from runner import run_case


def cases() -> list[Case]:
    found = []
    for d, v in shapes.GRID_LAYERS:
        for n in shapes.GRID_ROWS:
            shape = (n, d, v)
            found.append(case("fwd", torch.float32, shape, environments=("openblas",), grid=True))
            found.append(case("fwd_bwd", torch.float32, shape, activation="gelu", environments=(), grid=True))
            if n not in shapes.GRID_HALF_ROWS:
                continue
            for dtype in (torch.bfloat16, torch.float16):
                found.append(case("fwd", dtype, shape, environments=(), grid=True))
                if n * d * v <= shapes.GRID_HALF_BACKWARD:
                    found.append(case("fwd_bwd", dtype, shape, environments=(), grid=True))
    return found


CASES = cases()


@pytest.mark.benchmark(group="linear grid")
@harness.parametrize(CASES)
def test_linear_grid(benchmark, case):
    run_case(benchmark, case, __name__)
