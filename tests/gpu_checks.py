"""What only a GPU can show, for `make gpu`, compute-sanitizer and pytest (test_gpu.py). It needs torch alone:

    python tests/gpu_checks.py [--small] [NAME...]     runs all checks, or those whose names contain a NAME

--small: the shapes for compute-sanitizer, a few of each kernel, since it slows kernels down a hundredfold.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
import traceback

import torch
import torch.nn.functional as F
from gpu_compare import classes_of, compare, layouts, spiky
from torch import Tensor

import regfast
from regfast import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FLOATING = ("loss", "lse", "entropy", "logprob")
LARGE = (2**16 + 5, 2**15 + 1)  # of which the product is more than 2**31


class Skip(Exception):
    """Why a check has nothing to do on this machine."""


def need_memory(small: bool, size: int) -> None:
    if small:
        raise Skip("not small")
    size += 2 << 30  # for what PyTorch allocates on the way
    if torch.cuda.mem_get_info()[0] < size:
        raise Skip(f"{size / 2**30:.0f} GiB of memory are not free")


# ---- checks: each takes `small` ------------------------------------------------------------------------------------

# Rows of some lanes, of a block, of a cluster (or read twice where there are none), and longer than all of them hold.
ROWS = [(1, 1), (37, 10), (64, 1000), (9, 1025), (33, 4099), (7, 50257), (5, 131072), (3, 300001), (2, 1100003)]
SMALL_ROWS = [(37, 10), (5, 1025), (2, 70001)]


def check_softmax(small: bool) -> None:
    for dtype, shape in itertools.product(DTYPES[: 2 if small else 4], SMALL_ROWS if small else ROWS):
        for name, x in layouts(spiky(*shape, dtype=dtype)).items():
            for ours, theirs in (
                (regfast.softmax, torch.softmax),
                (regfast.log_softmax, torch.log_softmax),
                (regfast.logsumexp, torch.logsumexp),
            ):
                compare(
                    lambda x, f=ours: f(x, -1),
                    lambda x, f=theirs: f(x, -1),
                    x.requires_grad_(),
                    what=f"{ours.__name__} {shape} {dtype} {name}",
                )
    x = spiky(3, 21, 40, 33).requires_grad_()
    for dim in (0, 1, 2):
        compare(lambda x, d=dim: regfast.softmax(x, d), lambda x, d=dim: torch.softmax(x, d), x, what=f"dim {dim}")


def check_cross_entropy(small: bool) -> None:
    for dtype, (n, c) in itertools.product(DTYPES[: 2 if small else 4], SMALL_ROWS if small else ROWS):
        target = classes_of((n,), c)
        target[0] = c - 1
        for name, x in layouts(spiky(n, c, dtype=dtype)).items():
            for reduction in ("mean", "none"):
                compare(
                    lambda x, t, r=reduction: regfast.cross_entropy(x, t, reduction=r),
                    lambda x, t, r=reduction: F.cross_entropy(x, t, reduction=r),
                    x.requires_grad_(),
                    target,
                    what=f"cross_entropy {(n, c)} {dtype} {name} {reduction}",
                )


def check_cross_entropy_options(small: bool) -> None:
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 15.0, "logit_scale": 0.7}
    shapes = [(20, 33), (4, 2051)] if small else [(20, 33), (4, 2051), (3, 33, 40), (2, 70003)]
    for dtype, shape in itertools.product(DTYPES[: 1 if small else 4], shapes):
        n, c, *rest = shape
        x = spiky(*shape, dtype=dtype).requires_grad_()
        target = classes_of((n, *rest), c)
        probabilities = spiky(*shape).softmax(1).to(dtype).requires_grad_()
        weight = (torch.rand(c, device="cuda") + 0.1).to(dtype)
        for use_weight, outputs in itertools.product((None, weight), (("loss",), FLOATING)):
            for t in (target, probabilities):
                compare(
                    lambda x, t, w=use_weight, o=outputs: regfast.cross_entropy(x, t, w, outputs=o, **options),
                    lambda x, t, w=use_weight, o=outputs: reference.cross_entropy(
                        x, t, None if w is None else w.to(x.dtype), outputs=o, **options
                    ),
                    x,
                    t,
                    what=f"cross_entropy {shape} {dtype} {outputs} weights={use_weight is not None} target={t.dtype}",
                )
        argmax = regfast.cross_entropy(x, target, outputs="argmax")
        assert torch.equal(argmax, x.argmax(1)), f"argmax {shape} {dtype}"


def check_backward_again(small: bool) -> None:
    """The gradient that forward wrote is given away once; other upstream gradients replace it."""
    x, target = spiky(65, 3001, dtype=torch.bfloat16).requires_grad_(), classes_of((65,), 3001)
    loss = regfast.cross_entropy(x, target)
    exact = x.detach().float().requires_grad_()
    (true,) = torch.autograd.grad(F.cross_entropy(exact, target), exact)
    for factor in (1.0, 0.25, 1.0, 3.0):
        (grad,) = torch.autograd.grad(loss, x, loss.new_full((), factor), retain_graph=True)
        torch.testing.assert_close(grad.float(), true * factor, rtol=2**-7, atol=1e-7)
        grad.fill_(float("nan"))  # whoever got it may do as they like


def check_linear(small: bool) -> None:
    shapes = [(17, 30, 10), (130, 65, 131), (128, 128, 256)]
    shapes += [] if small else [(256, 784, 10), (1, 1024, 1024), (1000, 1003, 517), (2048, 4096, 1024)]
    formats = [(dtype, False) for dtype in DTYPES] + [(torch.float32, True)]
    if small:
        formats = [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]
    for (dtype, tf32), (n, d, v) in itertools.product(formats, shapes):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        x, w, b = (spiky(*s, dtype=dtype).mul(d**-0.25).requires_grad_() for s in ((n, d), (v, d), (v,)))
        for activation in ("none", "gelu") if small else reference.ACTIVATIONS:
            compare(
                lambda x, w, b, a=activation: regfast.linear(x, w, b, activation=a),
                lambda x, w, b, a=activation: reference.linear(x, w, b, activation=a),
                x,
                w,
                b,
                what=f"linear {(n, d, v)} {dtype} {activation}" + (" in tf32" if tf32 else ""),
                eps=2**-10 if tf32 else None,
            )
    torch.backends.cuda.matmul.allow_tf32 = False


def check_linear_large(small: bool) -> None:
    """Outputs and gradients of more than 2**31 elements."""
    n, v = LARGE
    need_memory(small, 4 * n * v * 2)
    x, w, b = (spiky(*s, dtype=torch.bfloat16).mul(64**-0.25) for s in ((n, 64), (v, 64), (v,)))
    picked = [0, 1, n // 2, n - 2, n - 1]
    y = regfast.linear(x, w.requires_grad_(), b, activation="gelu")
    upstream = torch.zeros_like(y)
    upstream[picked] = torch.randn(len(picked), v, device="cuda", dtype=torch.bfloat16)
    (grad,) = torch.autograd.grad(y, w, upstream)
    exact = w.detach().float().requires_grad_()
    true = F.gelu(F.linear(x[picked].float(), exact, b.float()))
    (true_grad,) = torch.autograd.grad(true, exact, upstream[picked].float())
    torch.testing.assert_close(y.detach()[picked].float(), true.detach(), rtol=2**-6, atol=0.02)
    torch.testing.assert_close(grad.float(), true_grad, rtol=2**-6, atol=0.02 * true_grad.abs().max().item())


def check_linear_cross_entropy(small: bool) -> None:
    """In one chunk and in several, of 128 rows each."""
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 15.0, "logit_scale": 0.7}
    shapes = [(150, 33, 70)] if small else [(150, 33, 70), (1000, 256, 2051), (300, 64, 70003)]
    for dtype, (n, d, v) in itertools.product(DTYPES[: 2 if small else 4], shapes):
        x, w, b = (spiky(*s, dtype=dtype).mul(d**-0.25).requires_grad_() for s in ((n, d), (v, d), (v,)))
        classes, probabilities = classes_of((n,), v), spiky(n, v).softmax(1).to(dtype).requires_grad_()
        weight = (torch.rand(v, device="cuda") + 0.1).to(dtype)
        for target, (outputs, reduction) in itertools.product(
            (classes, probabilities), (("loss", "mean"), ("loss", "none"), (FLOATING, "sum"))
        ):
            for further, budget in ((options, None), ({}, 1), (options, 1)):
                further = {"reduction": reduction, "outputs": outputs, **further}
                compare(
                    lambda x, w, b, t, c=weight, f=further, m=budget: regfast.linear_cross_entropy(
                        x, w, t, linear_bias=b, weight=c, memory_budget=m, **f
                    ),
                    lambda x, w, b, t, c=weight, f=further: reference.cross_entropy(
                        F.linear(x, w, b), t, c.to(x.dtype), **f
                    ),
                    x,
                    w,
                    b,
                    target,
                    what=f"linear_cross_entropy {(n, d, v)} {dtype} {further} budget={budget} target={target.dtype}",
                )


def check_linear_cross_entropy_memory(small: bool) -> None:
    """A call takes what the plan says, besides the gradients, and less than the logits would."""
    n, d, v = 4096, 512, 50257
    need_memory(small, 4 * n * v * 2)
    x, w = (spiky(*s, dtype=torch.bfloat16).mul(d**-0.25).requires_grad_() for s in ((n, d), (v, d)))
    target, budget = classes_of((n,), v), 64 << 20
    plan = regfast.linear_cross_entropy_plan(n, d, v, x.dtype, "cuda", memory_budget=budget)
    for _ in range(2):  # the first call allocates the libraries' workspaces
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss = regfast.linear_cross_entropy(x, w, target, memory_budget=budget)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del loss
    grads = 4 * (n + v) * d
    assert plan.chunks > 4 and peak <= grads + plan.peak_bytes + (32 << 20), (peak, grads, plan)


def check_mse_loss(small: bool) -> None:
    for dtype, reduction in itertools.product(DTYPES, ("none", "mean", "sum")):
        x, y = (spiky(129, 1001, dtype=dtype).requires_grad_() for _ in range(2))
        compare(
            lambda x, y, r=reduction: regfast.mse_loss(x, y, reduction=r),
            lambda x, y, r=reduction: reference.mse_loss(x, y, reduction=r),
            x,
            y,
            what=f"mse_loss {dtype} {reduction}",
        )


NLL = [
    ("squared", {"reduction": "mean"}),
    ("gaussian", {"reduction": "none"}),
    ("gaussian", {"reduction": "mean", "scaled": True, "weighted": True}),
    ("bernoulli", {"reduction": "sum", "scaled": True}),
    ("poisson", {"reduction": "mean", "weighted": True, "full": True}),
]


def check_linear_nll(small: bool) -> None:
    shapes = [(150, 33, 70), (700, 5, 1)] if small else [(150, 33, 70), (5000, 5, 1), (1000, 256, 2051)]
    for dtype, (n, d, v), (family, options) in itertools.product(DTYPES[: 2 if small else 4], shapes, NLL):
        x, w, b = (spiky(*s).mul(0.3 * d**-0.25).to(dtype).requires_grad_() for s in ((n, d), (v, d), (v,)))
        y = torch.rand(n, v, device="cuda").mul(1 if family == "bernoulli" else 4).to(dtype)
        scale = (torch.rand(v, device="cuda") + 0.3).to(dtype).requires_grad_(family == "gaussian")
        weight = torch.rand(n, device="cuda").to(dtype)
        given = [scale] * ("scaled" in options) + [weight] * ("weighted" in options)

        def loss(op, x, w, b, y, *rest, family=family, options=options):
            rest = list(rest)
            scale = rest.pop(0) if "scaled" in options else None
            number, mode = reference.FAMILIES.index(family), reference.REDUCTIONS.index(options["reduction"])
            return op(x, w, y, b, scale, *(rest or [None]), number, 1.0, "full" in options, mode, None)

        compare(
            lambda *t, loss=loss: loss(torch.ops.regfast.linear_nll, *t),
            lambda *t, loss=loss: loss(reference.linear_nll_loss, *t),
            x,
            w,
            b,
            y,
            *given,
            what=f"linear_nll {(n, d, v)} {dtype} {family} {options}",
        )


def check_linear_nll_large(small: bool) -> None:
    """More than 2**31 losses, in several chunks."""
    n, v = LARGE
    need_memory(small, 4 * n * v * 2)
    x, w, b = (spiky(*s, dtype=torch.bfloat16).mul(64**-0.25) for s in ((n, 64), (v, 64), (v,)))
    y = torch.empty(n, v, dtype=torch.bfloat16, device="cuda").normal_()
    picked = [0, 1, n // 2, n - 2, n - 1]
    loss = regfast.linear_nll(x, w.requires_grad_(), y, b, family="gaussian", full=False, reduction="none")
    upstream = torch.zeros_like(loss)
    upstream[picked] = torch.randn(len(picked), v, device="cuda", dtype=torch.bfloat16)
    (grad,) = torch.autograd.grad(loss, w, upstream, retain_graph=True)
    exact = w.detach().float().requires_grad_()
    true = 0.5 * (F.linear(x[picked].float(), exact, b.float()) - y[picked].float()).square()
    (true_grad,) = torch.autograd.grad(true, exact, upstream[picked].float())
    del upstream
    torch.testing.assert_close(loss.detach()[picked].float(), true.detach(), rtol=2**-7, atol=1e-4)
    torch.testing.assert_close(grad.float(), true_grad, rtol=2**-6, atol=0.02 * true_grad.abs().max().item())
    total = regfast.linear_mse_loss(x, w, y, b, reduction="sum", loss_dtype=torch.float32)
    torch.testing.assert_close(total.double(), 2 * loss.detach().sum(dtype=torch.float64), rtol=1e-4, atol=0)


def check_phm_linear(small: bool) -> None:
    shapes = [(9, 48, 24, 4), (130, 66, 33, 3)] if small else [(9, 48, 24, 4), (1000, 66, 33, 3), (2000, 1024, 512, 8)]
    for dtype, (rows, d, q, n) in itertools.product(DTYPES[: 2 if small else 4], shapes):
        x, a = spiky(rows, d, dtype=dtype).requires_grad_(), spiky(n, n, n).div(n).to(dtype).requires_grad_()
        s = spiky(n, q // n, d // n).div(d**0.5).to(dtype).requires_grad_()
        b = spiky(q, dtype=dtype).requires_grad_()
        for activation in ("none", "silu"):
            compare(
                lambda *t, f=activation: regfast.phm_linear(*t, activation=f),
                lambda x, a, s, b, f=activation: reference.ACTIVATIONS[f](
                    F.linear(x, sum(map(torch.kron, a, s)).to(x.dtype), b)
                ),
                x,
                a,
                s,
                b,
                what=f"phm_linear {(rows, d, q, n)} {dtype} {activation}",
            )


def everything(x: Tensor, w: Tensor, b: Tensor, target: Tensor) -> list[Tensor]:
    z, weight = regfast.linear(x, w, b, activation="gelu"), x.detach()[:, 0].square()
    return [
        z,
        regfast.softmax(z, -1),
        regfast.log_softmax(z, 0),
        regfast.logsumexp(z, 1),
        regfast.mse_loss(z, z.detach() * 2),
        regfast.cross_entropy(z, target),
        *regfast.cross_entropy(z, target, outputs=FLOATING, label_smoothing=0.1, z_loss=0.01),
        regfast.linear_cross_entropy(x, w, target, linear_bias=b, memory_budget=1),
        *regfast.linear_cross_entropy(x, w, target, linear_bias=b, memory_budget=1, outputs=FLOATING, reduction="none"),
        regfast.linear_mse_loss(x, w, z.detach(), b),
        regfast.linear_nll(x, w, z.detach(), b, family="gaussian", sigma=b.square() + 1, sample_weight=weight),
        regfast.linear_nll(x, w, z.detach().sigmoid(), b, family="bernoulli", reduction="none"),
        regfast.phm_linear(x, b[:64].view(4, 4, 4), w[:16].view(4, 16, 24), b[:64], activation="silu"),
    ]


def arguments(device="cuda", dtype=torch.bfloat16) -> list[Tensor]:
    torch.manual_seed(4)
    x, w, b = (spiky(*s, dtype=dtype, device=device).requires_grad_() for s in ((200, 96), (1700, 96), (1700,)))
    return [x, w, b, classes_of((200,), 1700, device=device)]


def step(tensors: list[Tensor]) -> list[Tensor]:
    """All results and gradients; sums of losses, so that no gradient needs a number from the device."""
    out = everything(*tensors)
    loss = sum(o.float().square().sum() for o in out)
    return [*out, *torch.autograd.grad(loss, tensors[:3])]


def check_same_bits(small: bool) -> None:
    first = step(arguments())
    for _ in range(1 if small else 20):
        assert all(torch.equal(a, b) for a, b in zip(first, step(arguments()), strict=True))


def check_no_synchronisation(small: bool) -> None:
    tensors = arguments()
    step(tensors)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_graph_capture(small: bool) -> None:
    tensors = arguments()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warms up what must not be set up while capturing
        for _ in range(3):
            step(tensors)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(tensors)
    with torch.no_grad():
        tensors[0].copy_(spiky(*tensors[0].shape, dtype=tensors[0].dtype))
        tensors[3].copy_(classes_of((200,), 1700))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(tensors), strict=True))


def check_streams(small: bool) -> None:
    """Work is queued on the stream that is current: what a stream has still to write is not read before."""
    tensors, expected = arguments(), step(arguments())
    torch.cuda.synchronize()
    late = [torch.full_like(t, -100) if t.dtype == torch.int64 else torch.zeros_like(t) for t in tensors]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(100_000_000)
        for to, t in zip(late, tensors, strict=True):
            to.copy_(t)
    late = [t.requires_grad_(t.is_floating_point()) for t in late]
    with torch.cuda.stream(stream):
        got = step(late)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def check_devices(small: bool) -> None:
    if torch.cuda.device_count() < 2:
        raise Skip("one device")
    expected = step(arguments("cuda:0"))
    got = step(arguments("cuda:1"))  # while cuda:0 is the current one
    assert all(t.device.index == 1 for t in got) and torch.cuda.current_device() == 0
    for a, b in zip(expected, got, strict=True):
        assert a.shape == b.shape
    again = step([t.detach().to("cuda:1").requires_grad_(t.requires_grad) for t in arguments("cuda:0")])
    for a, b in zip(expected, again, strict=True):
        torch.testing.assert_close(a, b.to("cuda:0"))


def check_large(small: bool) -> None:
    """More than 2**31 elements, and strides beyond: every product of sizes has 64 bits."""
    n, c = LARGE
    need_memory(small, 3 * n * c * 2)
    x = torch.empty(n, c, dtype=torch.bfloat16, device="cuda").normal_().requires_grad_()
    target = classes_of((n,), c, 0.1)
    picked = [0, 1, n // 2, n - 2, n - 1]
    loss = regfast.cross_entropy(x, target, reduction="none")
    (grad,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
    rows = x.detach()[picked].requires_grad_()
    true = F.cross_entropy(rows.float(), target[picked], reduction="none")
    (true_grad,) = torch.autograd.grad(true.sum(), rows)
    torch.testing.assert_close(loss.detach()[picked].float(), true.detach(), rtol=2**-7, atol=1e-5)
    torch.testing.assert_close(grad[picked], true_grad, rtol=2**-6, atol=1e-7)
    del grad
    total = regfast.cross_entropy(x, target, reduction="sum", loss_dtype=torch.float32)
    (grad,) = torch.autograd.grad(total, x)
    torch.testing.assert_close(grad[picked], true_grad, rtol=2**-6, atol=1e-7)
    torch.testing.assert_close(total, loss.double().sum().float(), rtol=1e-3, atol=0)
    del grad
    y = regfast.softmax(x.detach(), -1)
    torch.testing.assert_close(y[picked].float(), rows.detach().float().softmax(-1), rtol=2**-6, atol=1e-7)
    del y
    wide = x.detach().as_strided((3, 20), ((n * c - 20) // 2, 1))
    torch.testing.assert_close(regfast.softmax(wide, 0), torch.softmax(wide, 0))
    torch.testing.assert_close(regfast.softmax(wide, 1), torch.softmax(wide, 1))


# Ends without tearing down what the assertion has left unusable.
BAD_CLASS = """
import os, sys, torch, regfast
x = torch.randn(4, {classes}, device="cuda", requires_grad=True)
target = torch.tensor([0, {bad}, 1, -100], device="cuda")
try:
    regfast.cross_entropy(x, target).backward()
    torch.cuda.synchronize()
    said = "no error"
except RuntimeError as error:
    said = str(error)
print(said, file=sys.stderr, flush=True)
os._exit(0 if "device-side assert" in said else 1)
"""


def check_class_out_of_range(small: bool) -> None:
    """An assertion on the device, as PyTorch's, which ends the process's use of it: hence processes of their own."""
    if small:
        raise Skip("compute-sanitizer would report the assertion")
    for classes, bad in ((10, 10), (5000, -1), (5000, 2**62)):
        code = BAD_CLASS.format(classes=classes, bad=bad)
        done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"class {bad} of {classes}: {done.stderr[-500:]}"


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


def enabled() -> str:
    """Why nothing would be tested, or nothing."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if not regfast.build_info()["cuda"]:
        return "regfast was built without CUDA kernels"
    if os.environ.get("REGFAST_CUDA_KERNELS") != "1":
        return "REGFAST_CUDA_KERNELS=1 is not set"
    name = regfast.softmax(torch.zeros(1, 2, device="cuda", requires_grad=True)).grad_fn.name()
    return "" if "rf::" in name else f"the kernels are on, but softmax was recorded as {name}"


def lost() -> bool:
    """Whether the device has failed in a way that this process cannot recover from."""
    try:
        torch.cuda.synchronize()
        return False
    except RuntimeError:
        return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    if reason := enabled():
        print(f"gpu_checks: {reason}")
        return 2
    names = [name for name in CHECKS if not args.names or any(part in name for part in args.names)]
    failed = []
    for i, name in enumerate(names):
        torch.manual_seed(0)
        start = time.perf_counter()
        try:
            CHECKS[name](args.small)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            verdict = "ok"
        except Skip as skip:
            verdict = f"skipped: {skip}"
        except Exception:
            failed.append(name)
            verdict = "FAILED"
            traceback.print_exc()
        print(f"  {name:24} {verdict} ({time.perf_counter() - start:.1f} s)", flush=True)
        if verdict == "FAILED" and names[i + 1 :] and lost():
            rest = [sys.executable, __file__, *names[i + 1 :], *(["--small"] if args.small else [])]
            if subprocess.run(rest).returncode:
                failed.append("some after it")
            break
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
