"""A user's file: every function and class of regfast, as type checkers see it. tests/test_types.py runs right_uses();
`make types` checks all of it, where a wrong use without its `type: ignore` is an error and one that passes is too."""

# pyright: reportUnnecessaryTypeIgnoreComment=true, reportAttributeAccessIssue=true
from __future__ import annotations

from collections.abc import Sequence
from typing import assert_type

import torch
from torch import Tensor, nn

import regfast
from regfast.distributed import (
    VocabParallelCrossEntropyLoss,
    VocabParallelLinearCrossEntropyLoss,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)
from regfast.types import Activation, Output

N, D, V = 6, 4, 8


def layers(x: Tensor, w: Tensor, b: Tensor) -> None:
    assert_type(regfast.linear(x, w, b), Tensor)
    assert_type(regfast.linear(x, w, activation="gelu_tanh"), Tensor)
    name: Activation = "relu"
    layer = regfast.Linear(D, V, activation=name)
    assert_type(regfast.Linear.from_linear(nn.Linear(D, V)), regfast.Linear)
    assert_type(regfast.LinearActivation(D, V, activation="silu").weight, Tensor)
    regfast.LazyHead(D, V)(x)
    layer(x)
    a, s = torch.randn(2, 2, 2), torch.randn(2, V // 2, D // 2)
    assert_type(regfast.phm_linear(x, a, s, activation="tanh"), Tensor)
    phm, error = regfast.PHMLinear.from_linear(nn.Linear(D, V), 2)
    assert_type(error, float)
    assert_type(phm.merge(), regfast.Linear | regfast.LinearActivation)


def softmaxes(x: Tensor) -> None:
    assert_type(regfast.softmax(x), Tensor)
    assert_type(regfast.log_softmax(x, 1, torch.float64), Tensor)
    assert_type(regfast.logsumexp(x, (0, 1), keepdim=True), Tensor)


def losses(x: Tensor, w: Tensor, b: Tensor, y: Tensor, names: tuple[Output, ...]) -> None:
    logits = regfast.linear(x, w, b)
    assert_type(regfast.cross_entropy(logits, y), Tensor)
    assert_type(regfast.cross_entropy(logits, y, None, None, -100, None, "sum", 0.1, z_loss=1e-4), Tensor)
    assert_type(regfast.cross_entropy(logits, y, outputs="lse"), Tensor)
    assert_type(regfast.cross_entropy(logits, y, outputs=("loss",), normalizer=torch.tensor(3.0)), Tensor)
    out = regfast.cross_entropy(logits, y, reduction="none", outputs=("loss", "entropy", "argmax"))
    assert_type(out, regfast.CrossEntropyOutput)
    assert_type(out.entropy, Tensor)
    assert_type(out[0], Tensor)
    loss, lse = regfast.linear_cross_entropy(x, w, y, linear_bias=b, softcap=30.0, outputs=("loss", "lse"))
    assert_type(lse, Tensor)
    assert_type(regfast.linear_cross_entropy(x, w, y, memory_budget=1 << 20, filter_eps=2**-20), Tensor)
    assert_type(regfast.cross_entropy(logits, y, outputs=names), Tensor | regfast.CrossEntropyOutput)
    plan = regfast.linear_cross_entropy_plan(N, D, V, torch.float32)
    assert_type(plan, regfast.Plan)
    assert_type(plan.rows_per_chunk, int)
    assert_type(regfast.lazy_logits(x, w, b), Tensor)
    if isinstance(lazy := regfast.lazy_logits(x, w), regfast.LazyLogits):
        assert_type(lazy.multiplied(), Tensor)
    regfast.CrossEntropyLoss(reduction="sum", outputs=("loss", "lse"))(logits, y)
    regfast.LinearCrossEntropyLoss(D, V, bias=True, outputs="loss")(x, y)
    loss.backward()


def regressions(x: Tensor, w: Tensor, t: Tensor) -> None:
    assert_type(regfast.mse_loss(regfast.linear(x, w), t, reduction="none"), Tensor)
    assert_type(regfast.linear_mse_loss(x, w, t, sample_weight=torch.rand(N)), Tensor)
    assert_type(regfast.linear_nll(x, w, t, family="gaussian", sigma=torch.tensor(2.0)), Tensor)
    regfast.MSELoss(reduction="sum")(t, t)
    model = regfast.LinearNLLLoss(D, V, family="gaussian", sigma="learned")
    assert_type(model.sigma, float | Tensor | None)


def models(model: nn.Module) -> None:
    with regfast.accelerate(products=False) as handle:
        handle.restore()
    regfast.restore()
    report = regfast.replace(model, head=None)
    assert_type(report, regfast.Replacement)
    assert_type([entry.why for entry in report.left], list[str])
    report.restore()


def about() -> None:
    assert_type(regfast.isa(), str)
    assert_type(regfast.isas(), list[str])
    assert_type(regfast.build_info()["cuda"], bool)
    assert_type(regfast.memory.stats().kept_bytes, int)
    regfast.memory.release()
    assert_type(regfast.reference.softmax(torch.zeros(2, 3)), Tensor)


def of_ranks(logits: Tensor, x: Tensor, w: Tensor, y: Tensor) -> None:
    """Not run: there is one process."""
    assert_type(vocab_parallel_cross_entropy(logits, y, group=None), Tensor)
    several = vocab_parallel_linear_cross_entropy(x, w, y, outputs=("loss", "argmax"), sequence_parallel=True)
    assert_type(several, regfast.CrossEntropyOutput)
    VocabParallelCrossEntropyLoss()(logits, y)
    VocabParallelLinearCrossEntropyLoss(D, V, bias=True)(x, y)


def right_uses() -> None:
    x, w, b = torch.randn(N, D, requires_grad=True), torch.randn(V, D), torch.randn(V)
    layers(x, w, b)
    softmaxes(x)
    losses(x, w, b, torch.randint(V, (N,)), ("loss", "lse"))
    regressions(x, w, torch.randn(N, V))
    models(nn.Sequential(nn.Linear(D, V), nn.ReLU()))
    about()


def wrong_uses(x: Tensor, w: Tensor, y: Tensor, name: str, names: Sequence[str]) -> None:
    """Not run: each line raises."""
    regfast.linear(x, w, activation="gleu")  # type: ignore[arg-type]
    regfast.linear(x, w, None, "relu")  # type: ignore[call-arg]
    regfast.Linear(D, V, activation="swish")  # type: ignore[arg-type]
    regfast.LinearActivation(D, V, activation=name)  # type: ignore[arg-type]
    regfast.PHMLinear(D, V, 2, activation="gleu")  # type: ignore[arg-type]
    regfast.softmax(x, dim="rows")  # type: ignore[arg-type]
    regfast.mse_loss(x, x, reduction="avg")  # type: ignore[arg-type]
    regfast.cross_entropy(x, y, reduction="average")  # type: ignore[call-overload]
    regfast.cross_entropy(x, y, outputs="accuracy")  # type: ignore[call-overload]
    regfast.cross_entropy(x, y, outputs=("loss", "logprobs"))  # type: ignore[arg-type]
    regfast.cross_entropy(x, y, outputs=name)  # type: ignore[call-overload]
    regfast.cross_entropy(x, y, zloss=1e-4)  # type: ignore[call-overload]
    print(regfast.cross_entropy(x, y, outputs="lse").lse)  # type: ignore[attr-defined]
    regfast.cross_entropy(x, y, outputs=("loss", "lse")).backward()  # type: ignore[attr-defined]
    print(regfast.cross_entropy(x, y, outputs=("loss", "lse")).perplexity)  # type: ignore[attr-defined]
    regfast.linear_cross_entropy(x, w, y, memory_budget="1GiB")  # type: ignore[call-overload]
    regfast.linear_cross_entropy(x, w, y, outputs=names)  # type: ignore[call-overload]
    regfast.linear_nll(x, w, y, family="normal")  # type: ignore[arg-type]
    regfast.linear_nll(x, w, y)  # type: ignore[call-arg]
    regfast.LinearNLLLoss(D, V, family="gaussian", sigma="learnt")  # type: ignore[arg-type]
    regfast.accelerate(products="yes")  # type: ignore[arg-type]
    vocab_parallel_cross_entropy(x, y, reduction="average")  # type: ignore[call-overload]
    regfast.build_info()["gpu"]  # type: ignore[typeddict-item]
