"""softmax, log_softmax and logsumexp along the last dimension and an inner one, against torch and JAX."""

import functools

import harness
import pytest
import shapes
import torch
from harness import Call, Case, Work
from runner import run_case

import regfast

# Passes over the N x C elements (reads, writes). The backward of both softmaxes reads the gradient and the output; that
# of logsumexp reads the input.
PASSES = {
    "softmax": {"fwd": (1, 1), "fwd_bwd": (3, 2)},
    "log_softmax": {"fwd": (1, 1), "fwd_bwd": (3, 2)},
    "logsumexp": {"fwd": (1, 0), "fwd_bwd": (2, 1)},
}


def jax_call(op: str, x: torch.Tensor, mode: str) -> Call | None:
    try:
        import jax
        import jax.numpy as jnp
    except ImportError:
        return None
    if mode != "fwd":
        return None
    compiled = jax.jit(functools.partial(getattr(jax.nn, op), axis=-1))
    z = jnp.asarray(x.detach().numpy())
    return Call(lambda: jax.block_until_ready(compiled(z)))


def build(op: str, shape: tuple[int, ...], dim: int, dtype: torch.dtype, jax: bool) -> Work:
    x = torch.empty(shape, dtype=dtype).normal_(0, 3).requires_grad_()
    theirs, ours = getattr(torch, op), getattr(regfast, op)
    return Work(
        inputs=[x],
        eager=lambda x: theirs(x, dim),
        regfast=lambda x: ours(x, dim),
        jax=(lambda mode: jax_call(op, x, mode)) if jax else None,
    )


def case(op, mode, dtype, shape, dim=-1, jax=False, **more) -> Case:
    size = torch.Size(shape).numel() * dtype.itemsize
    reads, writes = PASSES[op][mode]
    return Case(
        op=op,
        mode=mode,
        dtype=dtype,
        shape=shape,
        build=functools.partial(build, op, shape, dim, dtype, jax),
        label="" if dim == -1 else f"dim{dim}",
        reads=reads * size,
        writes=writes * size,
        formula=f"read NC x{reads}, write NC x{writes}",
        largest=size,
        environments=("huge_pages",),
        **more,
    )


def cases() -> list[Case]:
    f32, bf16 = torch.float32, torch.bfloat16
    small, middle, large = shapes.SOFTMAX
    return [
        case("softmax", "fwd", f32, small, quick=True),
        case("softmax", "fwd_bwd", f32, small),
        case("softmax", "fwd", f32, middle, compile=True, headline=True),
        case("softmax", "fwd_bwd", f32, middle, headline=True),
        case("softmax", "fwd", f32, large, jax=True),
        case("softmax", "fwd_bwd", bf16, middle),
        case("softmax", "fwd_bwd", f32, shapes.SOFTMAX_INNER, dim=1),
        case("log_softmax", "fwd", f32, middle, quick=True),
        case("log_softmax", "fwd_bwd", f32, large),
        case("logsumexp", "fwd", f32, middle),
        case("logsumexp", "fwd", f32, large, headline=True),
        case("logsumexp", "fwd_bwd", f32, middle),
    ]


CASES = cases()


@pytest.mark.benchmark(group="softmax")
@harness.parametrize(CASES)
def test_softmax(benchmark, case):
    run_case(benchmark, case, __name__)
