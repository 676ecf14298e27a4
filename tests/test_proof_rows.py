"""Rows of the softmax family that a proof leaves to PyTorch: by their class, whose names Python and C++ share."""
# ruff: noqa: F811  # fixtures are taken from proof_examples.py by their names

import pytest
import torch
from proof_examples import first_tensors, gpu, proofs  # noqa: F401
from torch._subclasses.fake_tensor import FakeTensorMode

import regfast
from regfast import _C
from regfast._paths import recorded
from regfast.proof.measure import SHAPES, slower
from regfast.proof.measure_rows import timed_rows

pytestmark = pytest.mark.no_kernels("no GPU is there")


# A tensor of each class of rows, by the class's name.
def _rows(n, row_bytes, dtype=torch.bfloat16):
    return {"size": (n, row_bytes // dtype.itemsize), "dtype": dtype}


ROWS = {
    "short": _rows(129, 2048),
    "short few": _rows(128, 2048),
    "medium": _rows(1000, 2050),
    "medium few": _rows(3, 65536, torch.float32),
    "long": _rows(1000, 65544, torch.float64),
    "long few": _rows(2, 1 << 20),
    "columns": {"size": (3, 7, 10, 10), "dtype": torch.float32},
    "columns few": {"size": (3, 70000, 4), "dtype": torch.float16},
}
FAMILY = {
    "softmax": lambda x, t: regfast.softmax(x, 1),
    "log_softmax": lambda x, t: regfast.log_softmax(x, 1),
    "logsumexp": lambda x, t: regfast.logsumexp(x, 1),
    "cross_entropy": regfast.cross_entropy,
}


@pytest.mark.parametrize("op", FAMILY)
def test_rows_of_a_class_are_pytorchs_where_the_proof_says_so(gpu, first_tensors, op):
    """By the class alone: each choice sends the rows of its own class to PyTorch's function, and no others."""
    assert list(FAMILY) == list(_C.CUDA_ROW_OPS) and set(ROWS) == set(_C.CUDA_ROW_CLASSES)
    for chosen in ROWS:
        _C.use_cuda_kernels(gpu, list(_C.CUDA_OPS), [(f"{op} {chosen}", "aten")])
        for name, rows in ROWS.items():
            with FakeTensorMode(), recorded() as calls:
                x = torch.empty(**rows, device=f"cuda:{gpu}")
                target = torch.empty(x.shape[:1] + x.shape[2:], dtype=torch.int64, device=x.device)
                FAMILY[op](x, target)
            by_pytorch = [call.why for call in calls if call.path == "composite"]
            assert by_pytorch == [f"PyTorch's kernels are faster here for rows of class {name}"] * (name == chosen)


def test_options_that_pytorch_lacks_stay_with_the_kernels(gpu, first_tensors):
    _C.use_cuda_kernels(gpu, list(_C.CUDA_OPS), [("cross_entropy short", "aten")])
    with FakeTensorMode(), recorded() as calls:
        x = torch.empty(200, 10, device=f"cuda:{gpu}")
        target = torch.empty(200, dtype=torch.int64, device=x.device)
        regfast.cross_entropy(x, target, z_loss=0.1)
        regfast.cross_entropy(x, target, outputs=("loss", "lse"))
        assert not [call for call in calls if call.path == "composite"]


def test_what_is_timed_of_rows_is_of_the_class_that_it_decides(gpu):
    """The shapes that a GPU measures, which are too large to be made here, are told to C++ by fake tensors."""
    timed = [t for t in timed_rows(SHAPES, torch.device("cuda", gpu)) if t.mode == "fwd"]
    assert {t.rows for t in timed} == {f"{op} {name}" for op in _C.CUDA_ROW_OPS for name in _C.CUDA_ROW_CLASSES}
    for t in timed:
        _C.use_cuda_kernels(gpu, list(_C.CUDA_OPS), [(t.rows, "aten")])
        with FakeTensorMode(), recorded() as calls:
            t.ours(*(x.detach() for x in t.make()))
        assert [call.path for call in calls][:1] == ["composite"], t.name


def test_rows_are_left_to_pytorch_class_by_class_and_an_op_that_loses_them_all_as_a_whole():
    def entry(op, rows, ratio):
        return {"op": op, "rows": f"{op} {rows}" if rows else "", "ratio": ratio}

    measured = [
        *(entry("softmax", "short", ratio) for ratio in (0.5, 0.6)),
        *(entry("softmax", "long few", ratio) for ratio in (0.5, 2.5)),  # better in the mean
        *(entry("logsumexp", rows, 0.8) for rows in ("short", "columns")),
        entry("linear", "", 0.9),
        entry("mse_loss", "", 0.97),
        {"choice": "bfloat16 large", "ratio": 0.1},
    ]
    ops, rows = slower(measured)
    assert {op: round(ratio, 2) for op, ratio in ops.items()} == {"logsumexp": 0.8, "linear": 0.9}
    assert rows == {"softmax short": "aten"}
