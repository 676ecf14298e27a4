"""Cross-entropy from logits: forward, backward and both, in every target form, against F.cross_entropy and JAX."""

import functools

import harness
import pytest
import shapes
import torch
import torch.nn.functional as F
from harness import Call, Case, Work
from runner import run_case

import regfast

# Passes over the N x C logits: the forward reads them; the backward reads them and writes the gradient.
FORMULAS = {
    "fwd": "read NC",
    "bwd": "read NC, write NC",
    "fwd_bwd": "read NC twice, write NC",
}
PASSES = {"fwd": (1, 0), "bwd": (1, 1), "fwd_bwd": (2, 1)}


def jax_call(logits, target, mode: str) -> Call | None:
    """The same loss compiled by JAX for the CPU, if JAX is installed."""
    try:
        import jax
        import jax.numpy as jnp
    except ImportError:
        return None
    if mode == "bwd":  # JAX has no backward apart from the function that it derives
        return None
    z, t = jnp.asarray(logits.detach().numpy()), jnp.asarray(target.numpy().astype("int32"))

    def loss(z):
        chosen = jnp.take_along_axis(z, t[:, None], axis=1)[:, 0]
        return (jax.nn.logsumexp(z, axis=1) - chosen).mean()

    compiled = jax.jit(loss if mode == "fwd" else jax.value_and_grad(loss))
    return Call(lambda: jax.block_until_ready(compiled(z)))


def build(shape: tuple[int, ...], dtype: torch.dtype, label: str, jax: bool) -> Work:
    rows = (shape[0], *shape[2:])
    logits = torch.empty(shape, dtype=dtype).normal_(0, 3).requires_grad_()
    options = {}
    if label == "probabilities":
        target = torch.rand(shape, dtype=torch.float32).softmax(1).to(dtype)
    else:
        target = torch.randint(shape[1], rows)
    if label == "smoothing":
        options["label_smoothing"] = 0.1
    if label == "weights":
        options["weight"] = torch.rand(shape[1], dtype=dtype) + 0.5
        target[torch.rand(rows) < 0.3] = -100  # ignored rows
    return Work(
        inputs=[logits],
        eager=lambda z: F.cross_entropy(z, target, **options),
        regfast=lambda z: regfast.cross_entropy(z, target, **options),
        in_place=lambda z: regfast.cross_entropy(z, target, inplace_backward=True, **options),
        jax=(lambda mode: jax_call(logits, target, mode)) if jax else None,
    )


def case(mode, dtype, shape, label="", jax=False, huge_pages=True, **more) -> Case:
    elements = torch.Size(shape).numel()
    reads, writes = PASSES[mode]
    formula = FORMULAS[mode]
    if label == "probabilities":
        reads, formula = 2 * reads, formula + ", and the targets as often as the logits"
    return Case(
        op="cross_entropy",
        mode=mode,
        dtype=dtype,
        shape=shape,
        label=label,
        build=functools.partial(build, shape, dtype, label, jax),
        reads=reads * elements * dtype.itemsize,
        writes=writes * elements * dtype.itemsize,
        formula=formula,
        largest=elements * dtype.itemsize,
        environments=("huge_pages",) if huge_pages else (),
        **more,
    )


def cases() -> list[Case]:
    f32, bf16 = torch.float32, torch.bfloat16
    small, middle, large = shapes.CROSS_ENTROPY_FULL
    found = []
    for shape in shapes.CROSS_ENTROPY:
        modes = ("fwd", "bwd", "fwd_bwd") if shape in shapes.CROSS_ENTROPY_FULL else ("fwd_bwd",)
        for dtype in (f32, bf16):
            for mode in modes:
                both = mode == "fwd_bwd"
                found.append(
                    case(
                        mode,
                        dtype,
                        shape,
                        huge_pages=both or dtype == f32,
                        jax=dtype == f32 and shape in shapes.CROSS_ENTROPY_FULL,
                        compile=both and (dtype == f32 or shape == large),
                        headline=(both and shape in shapes.CROSS_ENTROPY_FULL and (dtype == f32 or shape == large))
                        or (mode == "fwd" and dtype == f32 and shape == large),
                        memory=both and shape == large,
                        quick=both and (shape == small or (shape == middle and dtype == f32)),
                    )
                )
    found.append(case("fwd_bwd", f32, middle, cold=True))
    for label in ("smoothing", "probabilities", "weights"):
        found.append(case("fwd_bwd", f32, shapes.CROSS_ENTROPY_OPTIONS, label=label))
    for dtype in (f32, bf16):
        found.append(case("fwd_bwd", dtype, shapes.CROSS_ENTROPY_KDIM))
    return found


CASES = cases()


@pytest.mark.benchmark(group="cross_entropy")
@harness.parametrize(CASES)
def test_cross_entropy(benchmark, case):
    run_case(benchmark, case, __name__)
