"""What all tests share: the tolerance rule, nasty inputs, and fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regfast import _C

ROOT = Path(__file__).resolve().parent.parent
DTYPES = tuple(getattr(torch, name) for name in _C.DTYPES)
HALF = (torch.bfloat16, torch.float16)
# Whether products of bfloat16 are those of pairs, whose factors are all rounded to it.
MULTIPLIES_PAIRS = _C.multiplies_pairs()
LAYOUTS = ("contiguous", "transposed", "strided", "padded", "expanded", "misaligned")
# These releases raise RuntimeError for a dim of another type.
BEFORE_2_13 = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
INF, NAN = float("inf"), float("nan")
# Runs a test that makes CPU tensors and nothing else with the kernels of the CPU and, emulated, with those of CUDA.
with_all_kernels = pytest.mark.usefixtures("kernels")


# Under make asan, whose library answers for the allocator and for faults.
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")
measures_memory = pytest.mark.skipif(
    SANITIZED or not Path("/proc/self/clear_refs").exists(), reason="reads the allocator's memory from Linux's /proc"
)


# Inputs


def spiky(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", size: float = 4.0) -> Tensor:
    """Normal values of which one in ten is large: flat inputs make every probability about 1/V and hide errors."""
    values = torch.randn(shape, dtype=torch.float64)
    spikes = torch.rand(shape) < 0.1
    return (values + size * spikes * torch.randn(shape)).to(device, dtype)


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout; unused memory between them is NaN, so that reading it shows.

    expanded repeats the first slice of the leading dimension with stride 0, so there the values change.
    """
    if layout == "contiguous" or values.dim() == 0:
        return values.contiguous()
    if layout == "transposed":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return values[:1].expand(values.shape)
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    *lead, last = values.shape
    if layout == "strided":
        view = values.new_full((*lead, 2 * last + 1), NAN)[..., 1 : 2 * last + 1 : 2]
    elif layout == "padded":
        view = values.new_full((*lead, last + 3), NAN)[..., 2 : last + 2]
    elif layout == "misaligned":
        view = values.new_full((values.numel() + 1,), NAN)[1:].view(values.shape)
    else:
        raise ValueError(layout)
    return view.copy_(values)


def class_targets(shape: tuple[int, ...], classes: int, ignored: float = 0.0, ignore_index: int = -100) -> Tensor:
    """Random classes, of which about the given share is ignored."""
    target = torch.randint(classes, shape)
    return torch.where(torch.rand(shape) < ignored, ignore_index, target)


def probability_targets(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Distributions over dimension 1 (0 if there is only one), some of them nearly one-hot."""
    return spiky(*shape, dtype=torch.float64).softmax(1 if len(shape) > 1 else 0).to(dtype)


def virtual(numel: int, dtype: torch.dtype) -> Tensor:
    """A zero tensor whose untouched pages take no memory: for offsets beyond 2**31 elements on small machines."""
    import numpy as np

    width = torch.empty((), dtype=dtype).element_size()
    try:
        return torch.from_numpy(np.zeros(numel * width, dtype=np.uint8)).view(dtype)
    except MemoryError:
        pytest.skip("this machine does not promise memory that it may not need (vm.overcommit_memory)")


# Tolerances


class Pool:
    """Errors relative to the magnitude, over many small tensors: the worst of ours against the worst of PyTorch's."""

    def __init__(self, dtype: torch.dtype):
        self.eps = torch.finfo(dtype).eps
        self.ours, self.theirs, self.what = 0.0, 32 * self.eps if dtype == torch.float64 else 0.0, ""

    def add(self, error: float, reference_error: float, what: str) -> None:
        if not error <= self.ours:
            self.ours, self.what = error, what
        self.theirs = max(self.theirs, reference_error)

    def check(self) -> None:
        allowed = 2 * self.theirs + self.eps
        assert self.ours <= allowed, (
            f"{self.what}: relative error {self.ours:.3g}, PyTorch's {self.theirs:.3g}, allowed {allowed:.3g}"
        )


def assert_as_good(
    ours: Tensor,
    theirs: Tensor,
    exact: Tensor,
    what: str = "",
    magnitude: Tensor | None = None,
    pool: Pool | None = None,
) -> None:
    """Our error against float64 is at most twice PyTorch's in the same dtype, plus one epsilon: the contract.

    Many tensors, collected in a Pool, tell whether it holds. A single one has few independent errors (that of a row's
    sum moves the whole row) and PyTorch's may be small by luck, so alone it is allowed twice as much and four epsilons.
    The epsilon is relative to the largest magnitude in the exact result, or in `magnitude` where sums cancel. float64
    has no better oracle than PyTorch's own, whose error is taken to be 32 epsilons (25 against extended precision).
    Infinities and NaNs must stand where the exact result, rounded to the dtype, has them.
    """
    assert ours.dtype == theirs.dtype, f"{what}: dtype {ours.dtype}, PyTorch {theirs.dtype}"
    assert ours.shape == theirs.shape, f"{what}: shape {tuple(ours.shape)}, PyTorch {tuple(theirs.shape)}"
    ours, theirs, exact = ours.detach(), theirs.detach(), exact.detach()
    if not ours.is_floating_point():
        assert torch.equal(ours, exact.to(ours.dtype)), what
        return
    rounded = exact.to(ours.dtype)
    finite = rounded.isfinite()
    torch.testing.assert_close(ours[~finite], rounded[~finite], rtol=0, atol=0, equal_nan=True, msg=what or None)
    if not finite.any():
        return
    info = torch.finfo(ours.dtype)
    size = exact[finite].abs().max() if magnitude is None else magnitude.abs().max()
    error = (ours.double() - exact)[finite].abs().max()
    reference_error = (theirs.double() - exact)[finite].nan_to_num(nan=INF).abs().max()
    size = size.clamp(min=info.smallest_normal)
    if pool is not None:
        pool.add((error / size).item(), (reference_error / size).item(), what)
        return
    epsilon = info.eps * size
    if ours.dtype == torch.float64:
        reference_error = reference_error.clamp(min=32 * epsilon)
    allowed = 4 * reference_error + 4 * epsilon
    assert error <= allowed, f"{what}: error {error:.3g}, PyTorch's {reference_error:.3g}, allowed {allowed:.3g}"


def evaluate(fn: Callable, tensors: list[Tensor | None], grads: list[Tensor] | None, dtype: torch.dtype | None = None):
    """Outputs of fn on fresh leaves, and the gradients of those that require one, for the given grad_outputs."""
    leaves = []
    for t in tensors:
        leaf = t
        if t is not None and (t.is_floating_point() or t.is_complex()):
            leaf = t.detach() if dtype is None else t.detach().to(dtype)
            leaf.requires_grad_(t.requires_grad)
        leaves.append(leaf)
    outputs = fn(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    if grads is None:
        grads = [torch.randn(o.shape, dtype=torch.float64).to(o) for o in outputs]
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    roots = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
    results = []
    if wanted and roots:
        results = torch.autograd.grad([r[0] for r in roots], wanted, [r[1] for r in roots], materialize_grads=True)
    return outputs, list(results), grads


def torchs_mse_loss(x: Tensor, y: Tensor, **options: object) -> Tensor:
    """F.mse_loss of operands that have its own dtype: it takes others, but its backward in torch 2.11 does not."""
    dtype = F.mse_loss(x.detach(), y.detach()).dtype
    return F.mse_loss(x.to(dtype), y.to(dtype), **options)


def check(
    ours: Callable,
    theirs: Callable,
    *tensors: Tensor | None,
    exact: Callable | None = None,
    grads: list[Tensor] | None = None,
    magnitude: Callable | None = None,
    terms: float | None = None,
    what: str = "",
    pool: Pool | None = None,
) -> None:
    """Values and gradients of `ours` against `theirs` in the same dtype and `exact` (or theirs) in float64.

    grad_outputs are random unless given. Where sums cancel, `magnitude`, run on absolute values, bounds their terms, or
    `terms` those of the gradients, as a multiple of the largest grad_output.
    """
    tensors = list(tensors)
    out, grad, grads = evaluate(ours, tensors, grads)
    their_out, their_grad, _ = evaluate(theirs, tensors, grads)
    true_out, true_grad, _ = evaluate(exact or theirs, tensors, grads, torch.float64)
    sizes = [None] * (len(out) + len(grad))
    if magnitude is not None:
        absolute = [t if t is None else t.detach().abs().requires_grad_(t.requires_grad) for t in tensors]
        size_out, size_grad, _ = evaluate(magnitude, absolute, [g.abs() for g in grads], torch.float64)
        sizes = [*size_out, *size_grad]
    if terms is not None:
        bound = (
            torch.stack([g.detach().double().abs().max() for g in grads if g.numel()] or [torch.zeros(())]).max()
            * terms
        )
        sizes = [*sizes[: len(out)], *(torch.maximum(g.abs().max(), bound) if g.numel() else None for g in true_grad)]
    assert len(out) == len(their_out) and len(grad) == len(their_grad)
    for i, (a, b, c) in enumerate(zip(out, their_out, true_out, strict=True)):
        assert_as_good(a, b, c, f"{what} output {i}", sizes[i], pool)
    for i, (a, b, c) in enumerate(zip(grad, their_grad, true_grad, strict=True)):
        assert_as_good(a, b, c, f"{what} gradient {i}", sizes[len(out) + i], pool)


def assert_same_error(ours: Callable, theirs: Callable, op: str, *words: str) -> None:
    """`ours` raises what `theirs` raises, and says which op, which argument, what was expected and what came."""
    with pytest.raises(Exception) as wanted:
        theirs()
    with pytest.raises(wanted.type) as got:
        ours()
    assert got.type is wanted.type, f"raised {got.type.__name__}, PyTorch {wanted.type.__name__}"
    message = str(got.value)
    for word in (f"regfast.{op}", "expected", "got", *words):
        assert word in message, f"{word!r} is not in {message!r}"


def fresh_process(code: str, *, timeout: float = 120, **environment: str) -> str:
    """Standard output of Python code run in a new interpreter, which must succeed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
