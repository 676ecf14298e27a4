"""Devices without kernels of ours: products are torch's, in the type that they are given in.

Fake tensors have no memory, so that any device will do; but none that torch was built without has autograd.
"""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from util import HALF

import regfast

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "mv", "addmv")


class Operators(TorchDispatchMode):
    """Collects the dtypes of products' operands, and the sizes of what is converted to float32."""

    def __init__(self):
        super().__init__()
        self.products, self.widened, self.names = [], [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        self.names.add(func.namespace)
        if func.overloadpacket.__name__ in PRODUCTS:
            self.products += [t.dtype for t in tensors]
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype == torch.float32:
            self.widened.append(tuple(out.shape))
        return out


def operands(device, dtype, *shapes):
    return [torch.empty(shape, device=device, dtype=dtype) for shape in shapes]


def linear(device, dtype, activation="none"):
    return regfast.linear(*operands(device, dtype, (6, 4), (5, 4), (5,)), activation=activation)


def phm_linear(device, dtype):
    return regfast.phm_linear(*operands(device, dtype, (6, 4), (2, 2, 2), (2, 3, 2), (6,)))


def linear_cross_entropy(device, dtype):
    x, w, b = operands(device, dtype, (6, 4), (5, 4), (5,))
    return regfast.linear_cross_entropy(x, w, torch.zeros(6, device=device, dtype=torch.int64), linear_bias=b)


def linear_nll(device, dtype):
    x, w, b, y = operands(device, dtype, (6, 4), (5, 4), (5,), (6, 5))
    return regfast.linear_nll(x, w, y.detach(), b, family="gaussian")


CALLS = {
    "linear": linear,
    "linear gelu": lambda *a: linear(*a, activation="gelu"),
    "phm_linear": phm_linear,
    "linear_cross_entropy": linear_cross_entropy,
    "linear_nll": linear_nll,
}


@contextmanager
def autocast(device, dtype):
    """torch.autocast, which turns itself off for a device that torch was built without."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])
        torch.clear_autocast_cache()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("device", ["cuda", "xpu"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("context", [nullcontext, autocast])
def test_products_are_in_the_type_they_come_in(name, device, dtype, context):
    given = torch.float32 if context is autocast else dtype
    with FakeTensorMode(), Operators() as seen, context(*(device, dtype) if context is autocast else ()):
        result = CALLS[name](device, given)
    assert set(seen.products) == {dtype} and len(seen.products) >= 2
    assert result.device.type == device
    # Predictions and losses may be float32; copies of inputs and weights would take twice their memory.
    assert not {(6, 4), (5, 4), (4, 5), (6, 4), (4, 6), (2, 2, 2), (2, 3, 2)} & set(seen.widened)


def test_the_cpu_has_kernels():
    # What the test above would miss if no call reached the kernels anywhere.
    with Operators() as seen:
        linear("cpu", torch.bfloat16)
    assert "regfast" in seen.names and not seen.products
