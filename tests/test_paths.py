"""Which way each call takes: what is recorded and printed, and that value tests fail off the way they are meant for."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from util import ROOT, fresh_process, spiky

import regfast
from regfast._paths import recorded


def leaf(*shape, dtype=torch.float32):
    return spiky(*shape, dtype=dtype).requires_grad_()


def calls_of(fn):
    with recorded() as calls:
        fn()
    return calls


def train(op, *arguments, **options):
    out = op(*arguments, **options)
    out.backward(torch.ones_like(out))


ROWS, CLASSES = torch.randn(7, 6), torch.randint(6, (7,))
OPS = {
    "linear": lambda: train(regfast.linear, leaf(7, 5), leaf(6, 5), leaf(6), activation="gelu"),
    "phm_linear": lambda: train(regfast.phm_linear, leaf(7, 6), leaf(2, 2, 2), leaf(2, 4, 3), leaf(8)),
    "softmax": lambda: train(regfast.log_softmax, leaf(7, 6)),
    "logsumexp": lambda: train(regfast.logsumexp, leaf(7, 6)),
    "cross_entropy": lambda: train(regfast.cross_entropy, leaf(7, 6), CLASSES, reduction="none"),
    "linear_cross_entropy": lambda: train(
        regfast.linear_cross_entropy, leaf(7, 5), leaf(6, 5), CLASSES, reduction="none"
    ),
    "linear_nll": lambda: train(regfast.linear_mse_loss, leaf(7, 5), leaf(6, 5), ROWS, reduction="none"),
    "mse_loss": lambda: train(regfast.mse_loss, leaf(7, 6), ROWS),
}


@pytest.mark.parametrize("op", OPS)
def test_forward_and_backward_are_one_record_each(op):
    calls = calls_of(OPS[op])
    assert [c.op for c in calls] == [f"{op}_forward", f"{op}_backward"]
    assert all((c.path, c.by, c.why) == ("kernels", regfast.isa(), "") for c in calls)
    assert all("float32[" in c.tensors for c in calls)


def test_a_reduced_loss_has_its_gradients_from_forward():
    x, w = leaf(7, 5), leaf(6, 5)
    calls = calls_of(lambda: train(regfast.linear_cross_entropy, x, w, CLASSES))
    assert [c.op for c in calls] == ["linear_cross_entropy_forward_backward"]
    for _ in range(2):  # of an upstream gradient that came before
        calls = calls_of(lambda: train(regfast.cross_entropy, leaf(7, 6), CLASSES))
    assert [c.op for c in calls] == ["cross_entropy_forward_backward"]
    calls = calls_of(lambda: train(regfast.linear_mse_loss, x, w, ROWS))
    assert [c.op for c in calls] == ["linear_nll_forward_backward"]


def test_tensors_are_described():
    (call,) = calls_of(lambda: regfast.linear(torch.ones(2, 3, 4), torch.ones(5, 4), torch.ones(5)))
    assert call.tensors == "float32[2, 3, 4], float32[5, 4], float32[5]"


def dual(x):
    with forward_ad.dual_level():
        return regfast.softmax(forward_ad.make_dual(x, torch.ones_like(x)))


def twice(x):
    (g,) = torch.autograd.grad(regfast.mse_loss(x, ROWS), x, create_graph=True)
    return g


COMPOSITES = {
    "vmap": ("softmax", lambda: torch.func.vmap(regfast.softmax)(ROWS)),
    "torch.func transform": ("logsumexp", lambda: torch.func.grad(lambda x: regfast.logsumexp(x, 0))(ROWS[0])),
    "forward-mode tangent": ("softmax", lambda: dual(ROWS)),
    "create_graph": ("mse_loss_backward", lambda: twice(leaf(7, 6))),
    "int64 has no kernel": ("linear", lambda: regfast.linear(CLASSES[None], CLASSES[None])),
    "complex64 has no kernel": ("linear", lambda: regfast.linear(ROWS + 0j, ROWS + 0j)),
    "weight or bias of an unusual shape": ("linear", lambda: regfast.linear(ROWS, ROWS[0])),
    "a weight that requires grad": (
        "cross_entropy",
        lambda: regfast.cross_entropy(ROWS, ROWS.softmax(1), weight=torch.ones(6, requires_grad=True)),
    ),
    "a target, weight or scale that requires grad": (
        "linear_nll",
        lambda: regfast.linear_mse_loss(ROWS, ROWS, leaf(7, 7)),
    ),
    "input and target differ in kind": ("mse_loss", lambda: regfast.mse_loss(ROWS, ROWS.double())),
    "a weight of each element": ("mse_loss", lambda: regfast.mse_loss(ROWS, ROWS, weight=ROWS.abs())),
}


@pytest.mark.parametrize("why", COMPOSITES)
def test_composites_say_why(why):
    op, call = COMPOSITES[why]
    composites = [c for c in calls_of(call) if c.path == "composite"]
    assert [(c.op, c.by, c.why) for c in composites] == [(op, "", why)]


def test_calls_on_other_threads_are_recorded_and_recorders_nest():
    with recorded() as outer:
        regfast.softmax(ROWS)
        with recorded() as inner, ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: regfast.logsumexp(ROWS), range(20)))
    assert [c.op for c in inner] == ["logsumexp_forward"] * 20
    assert [c.op for c in outer] == ["softmax_forward"] + ["logsumexp_forward"] * 20


def test_compiled_code_is_recorded_when_it_runs():
    compiled = torch.compile(regfast.softmax, backend="eager", fullgraph=True)
    compiled(ROWS)
    assert [c.op for c in calls_of(lambda: compiled(ROWS))] == ["softmax_forward"]


# Printed

CODE = """
    import os
    os.dup2(1, 2)
    import torch, regfast
    x = torch.ones(64, 256)
    w = torch.ones(128, 256)
    regfast.linear(x, w)
    regfast.linear(x.long(), w.long())
"""
COMPOSITE = "regfast.linear(int64[64, 256], int64[128, 256]): composite: int64 has no kernel"


def test_verbose_prints_a_line_for_each_call():
    isa = regfast.isa()
    lines = fresh_process(CODE, REGFAST_VERBOSE="1", REGFAST_GEMM="own").splitlines()
    forward = f"regfast.linear_forward(float32[64, 256], float32[128, 256]): kernels of {isa}"
    assert lines == [forward, COMPOSITE]
    lines = fresh_process(CODE, REGFAST_VERBOSE="1", REGFAST_GEMM="aten").splitlines()
    assert lines == [forward + ": product by ATen: 64 x 128 x 256 float32, REGFAST_GEMM=aten", COMPOSITE]


@pytest.mark.parametrize("value", ["", "0"])
def test_nothing_is_printed_unless_asked(value):
    assert fresh_process(CODE, REGFAST_VERBOSE=value) == ""


# Value tests fail off their way


def test_modules_of_ops_are_marked():
    ops = ("linear", "phm_linear", "softmax", "cross_entropy", "mse")
    modules = [path for op in ops for path in (ROOT / "tests").glob(f"test_{op}*.py")]
    assert len(modules) >= 15
    assert [path.name for path in modules if "pytestmark = pytest.mark.kernels(" not in path.read_text()] == []


SUITE = """
import pytest, torch, regfast

pytestmark = pytest.mark.kernels("softmax", "linear_forward")
X = torch.ones(64, 64)

def test_passes_by_kernels():
    regfast.softmax(X)

@pytest.mark.composite("vmap")
def test_passes_by_the_composite_it_is_about():
    torch.func.vmap(regfast.softmax)(X)

@pytest.mark.no_kernels("an error")
def test_passes_without_kernels():
    pass

def test_fails_by_the_composite():
    regfast.softmax(X), torch.func.vmap(regfast.softmax)(X)

@pytest.mark.composite("create_graph")
def test_fails_by_another_composite():
    torch.func.vmap(regfast.softmax)(X)

def test_fails_by_the_product_of_aten():
    regfast.linear(X, X)

def test_fails_by_another_op():
    regfast.logsumexp(X)

def test_fails_without_kernels():
    torch.softmax(X, 0)
"""


def test_value_tests_fail_off_their_way(tmp_path):
    (tmp_path / "test_suite.py").write_text(SUITE)
    options = ["-rA", "-p", "conftest", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "--rootdir", tmp_path]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, tmp_path / "test_suite.py"],
        cwd=ROOT,
        env={**os.environ, "REGFAST_GEMM": "aten", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith(("PASSED", "FAILED", "ERROR"))]
    verdicts = {line[1].split("::")[-1]: line[0] for line in lines}
    assert len(verdicts) == SUITE.count("def test_"), done.stdout + done.stderr
    assert all(verdict == ("PASSED" if "_passes_" in name else "FAILED") for name, verdict in verdicts.items()), lines
