"""accelerate(products=True): torch's own mm, addmm, bmm and baddbmm by our GEMM, through torch's dispatcher."""

import sys
import warnings

import pytest
import torch
from torch import nn
from util import HALF, LAYOUTS, check, fresh_process, lay_out, spiky

import regfast
from regfast._paths import recorded

module = sys.modules["regfast.accelerate"]


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    monkeypatch.setattr(module, "_PRODUCTS_FROM", [1, 1, 1, 1])
    yield
    regfast.restore()


def ops(call) -> list[str]:
    with recorded() as calls:
        call()
    return [c.op for c in calls]


def ours(call):
    """The call with our products, which it has to come to."""

    def run(*tensors):
        with regfast.accelerate(products=True), recorded() as calls:
            result = call(*tensors)
        assert [c.op for c in calls if c.op in ("mm", "addmm", "bmm", "baddbmm")], calls
        return result

    return run


SHAPES = [(1, 7, 5), (7, 1, 5), (5, 7, 1), (40, 33, 50), (130, 64, 100)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_matrices(layout, dtype):
    for m, k, n in SHAPES:
        a = lay_out(spiky(m, k, dtype=dtype), layout).requires_grad_()
        b = lay_out(spiky(k, n, dtype=dtype), layout).requires_grad_()
        check(ours(torch.mm), torch.mm, a, b, magnitude=torch.mm, what=f"mm {m} {k} {n}")
        check(ours(torch.matmul), torch.matmul, a, b.detach(), magnitude=torch.matmul, what="matmul")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches(layout, dtype, threads):
    for count in (1, 2):
        torch.set_num_threads(count)
        for batches, m, k, n in ((1, 5, 6, 7), (5, 40, 33, 50), (2, 70, 64, 90), (12, 64, 64, 64)):
            a = lay_out(spiky(batches, m, k, dtype=dtype), layout).requires_grad_()
            b = lay_out(spiky(batches, k, n, dtype=dtype), layout).requires_grad_()
            check(ours(torch.bmm), torch.bmm, a, b, magnitude=torch.bmm, what=f"bmm {batches} {m} {k} {n}")


@pytest.mark.parametrize("beta, alpha", [(1, 1), (0, 1), (1, -0.5), (2.5, 1), (0, 3), (0.5, 0.25)])
@pytest.mark.parametrize("shape", [(), (1,), (50,), (1, 50), (33, 1), (33, 50)], ids=str)
def test_sums(shape, beta, alpha, dtype):
    a, b, c = spiky(33, 20, dtype=dtype), spiky(20, 50, dtype=dtype), spiky(*shape, dtype=dtype)
    for t in (a, b, c):
        t.requires_grad_()

    def addmm(c, a, b):
        return torch.addmm(c, a, b, beta=beta, alpha=alpha)

    def size(c, a, b):
        return torch.addmm(c, a, b, beta=abs(beta), alpha=abs(alpha))

    check(ours(addmm), addmm, c, a, b, magnitude=size)
    if not shape or len(shape) == 2:

        def baddbmm(c, a, b):
            return torch.baddbmm(c, torch.stack([a, a * 2]), torch.stack([b, b + 1]), beta=beta, alpha=alpha)

        def batch_size(c, a, b):
            return torch.baddbmm(c, torch.stack([a, a * 2]), torch.stack([b, b + 1]), beta=abs(beta), alpha=abs(alpha))

        check(ours(baddbmm), baddbmm, c, a, b, magnitude=batch_size)


def test_beta_of_zero_ignores_what_is_there():
    a, b, c = torch.randn(40, 20), torch.randn(20, 30), torch.full((40, 30), float("nan"))
    assert_close = torch.testing.assert_close
    assert_close(ours(lambda: torch.addmm(c, a, b, beta=0, alpha=2))(), 2 * (a @ b))
    assert_close(ours(lambda: c.clone().addmm_(a, b, beta=0))(), a @ b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out_and_in_place(dtype):
    a, b, c = (spiky(*s, dtype=dtype) for s in ((30, 20), (20, 50), (30, 50)))
    a3, b3, c3 = (spiky(*s, dtype=dtype) for s in ((3, 30, 20), (3, 20, 50), (3, 30, 50)))
    calls = {
        "mm": lambda out: torch.mm(a, b, out=out),
        "addmm": lambda out: torch.addmm(c, a, b, out=out),
        "bmm": lambda out: torch.bmm(a3, b3, out=out),
        "baddbmm": lambda out: torch.baddbmm(c3, a3, b3, beta=2, out=out),
    }
    for name, call in calls.items():
        true = call(torch.empty(0, dtype=dtype))
        wide, sparse = (torch.zeros(*true.shape[:-1], 120, dtype=dtype) for _ in range(2))
        places = {
            "empty": torch.empty(0, dtype=dtype),
            "of its shape": torch.zeros_like(true),
            "transposed": torch.zeros_like(true).transpose(-1, -2).contiguous().transpose(-1, -2),
            "part of a row": wide[..., 10:60],
            "every other column": sparse[..., :100:2],
        }
        for where, out in places.items():
            version = out._version
            result = ours(lambda out, call=call: call(out))(out)
            assert result is out and out._version > version
            torch.testing.assert_close(out, true, msg=f"{name} {where}", rtol=2e-2, atol=2e-2)
        for untouched in (wide[..., :10], wide[..., 60:], sparse[..., 1::2], sparse[..., 100:]):
            assert not untouched.any()
    square = spiky(40, 40, dtype=dtype)
    true = square @ square
    torch.testing.assert_close(ours(lambda: torch.mm(square, square, out=square))(), true, rtol=2e-2, atol=2e-2)
    for true, call in (
        (c.clone().addmm_(a, b, alpha=2), lambda: c.clone().addmm_(a, b, alpha=2)),
        (c3.clone().baddbmm_(a3, b3), lambda: c3.clone().baddbmm_(a3, b3)),
    ):
        torch.testing.assert_close(ours(call)(), true, rtol=2e-2, atol=2e-2)


def test_what_goes_on_to_aten(monkeypatch):
    a, b = torch.randn(30, 20), torch.randn(20, 50)
    with regfast.accelerate(products=True):
        for call in (
            lambda: torch.mm(a.cfloat(), b.cfloat()),
            lambda: torch.mm(a.long(), b.long()),
            lambda: torch.mm(a[:0], b),
            lambda: torch.mm(a[:, :0], b[:0]),
            lambda: torch.bmm(torch.empty(0, 3, 4), torch.empty(0, 4, 5)),
            lambda: torch.mm(a.to("meta"), b.to("meta")),
            lambda: torch.mm(a.to_sparse(), b),
        ):
            assert not ops(call)
        assert torch.equal(torch.mm(a[:, :0], b[:0]), torch.zeros(30, 50))
        for wrong in (
            lambda: torch.mm(a, a),
            lambda: torch.mm(a, b.double()),
            lambda: torch.addmm(torch.zeros(7), a, b),
            lambda: torch.bmm(a[None], b.expand(2, 20, 50)),
            lambda: torch.mm(a, b, out=torch.empty(30, 50).long()),
            lambda: torch.mm(a, b[0]),
            lambda: torch.zeros(1, 50).addmm_(a, b),
        ):
            with pytest.raises(RuntimeError) as error:
                wrong()
            assert "regfast" not in str(error.value)
    monkeypatch.setattr(module, "_PRODUCTS_FROM", [30 * 20 * 50 + 1, -1, 1, 1])
    with regfast.accelerate(products=True):
        assert not ops(lambda: torch.mm(a, b)) and not ops(lambda: torch.mm(a.double(), b.double()))
        assert ops(lambda: torch.mm(a.half(), b.half())) == ["mm"]


def test_comes_and_goes():
    a, b = torch.randn(40, 40), torch.randn(40, 40)
    assert not ops(lambda: a @ b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            with regfast.accelerate(products=True) as outer:
                with regfast.accelerate():
                    assert ops(lambda: a @ b) == ["mm"]
                with regfast.accelerate(products=True):
                    pass
                assert ops(lambda: a @ b) == ["mm"]
            assert not ops(lambda: a @ b)
            outer.restore()
        with regfast.accelerate():
            assert not ops(lambda: a @ b)

    @regfast.accelerate(products=True)
    def product():
        return ops(lambda: a @ b)

    assert product() == ["mm"] and not ops(lambda: a @ b)
    with pytest.raises(TypeError, match=r"regfast\.accelerate: products: expected a bool, got int"):
        regfast.accelerate(products=1)


def test_models_that_know_nothing():
    """Attention by hand, a backward pass, F.linear, Conv1D's addmm; and linear of ours, whose ATen is torch's own."""
    x = torch.randn(2, 3, 20, 16, requires_grad=True)
    layer = nn.Linear(16, 16)

    def step():
        y = layer(x)
        scores = torch.softmax(y @ y.transpose(-1, -2) / 4, -1)
        return torch.autograd.grad((scores @ x).square().sum(), [x, *layer.parameters()])

    true = step()
    with regfast.accelerate(products=True):
        assert {"bmm", "addmm", "mm"} <= set(ops(step))
        torch.testing.assert_close(step(), true)
        torch.testing.assert_close(torch.func.vmap(torch.mm)(x[0], x[1].transpose(1, 2)), x[0] @ x[1].transpose(1, 2))


def test_compiled_by_inductor():
    torch._dynamo.reset()
    a, b = (spiky(64, 64, dtype=torch.bfloat16) for _ in range(2))
    compiled = torch.compile(lambda a, b: torch.mm(a, b).relu() @ b, fullgraph=True)
    true = compiled(a, b)
    with regfast.accelerate(products=True):
        assert ops(lambda: compiled(a, b)) == ["mm", "mm"]
        torch.testing.assert_close(compiled(a, b), true, rtol=2e-2, atol=2e-1)
    assert not ops(lambda: compiled(a, b))
    torch._dynamo.reset()


@pytest.mark.parametrize("gemm", ["aten", "own"])
def test_follows_the_forced_side_and_ends_with_the_process(gemm):
    out = fresh_process(
        """
        import torch, regfast, os
        from regfast._paths import recorded
        a = torch.randn(64, 64).bfloat16()
        true = a @ a
        regfast.accelerate(products=True)
        with recorded() as calls:
            result = a @ a
            assert torch.allclose(regfast.linear(a, a.t()).float(), true.float(), rtol=2e-2, atol=2e-1)
        assert torch.allclose(result.float(), true.float(), rtol=2e-2, atol=2e-1)
        print([c.op for c in calls])
        """,
        REGFAST_GEMM=gemm,
    )
    assert out.strip() == {"aten": "['linear_forward']", "own": "['mm', 'linear_forward']"}[gemm]


def test_the_same_bits_with_any_number_of_threads(threads):
    for dtype in (torch.float32, *HALF):
        a, b = spiky(9, 130, 120, dtype=dtype), spiky(9, 120, 140, dtype=dtype)
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ours(torch.bmm)(a, b))
        assert all(torch.equal(results[0], r) for r in results)
